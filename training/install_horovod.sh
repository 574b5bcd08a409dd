#!/usr/bin/env bash
# Build Horovod 0.28.1 (PyTorch, Gloo) into the Python environment given as $1 (default: .venv).
#
# The last release predates torch 2.1, whose headers need C++17, and torch 2.13's need C++20, while the sdist
# asks for C++14 (horovod#3996); a CMake of today also refuses its policy version. Both are one-word patches.
# torch, setuptools and cmake must already be in the environment: the extension links against that very torch.
set -euo pipefail

version=0.28.1
sha256=92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0
environment=$(cd "${1:-.venv}" && pwd)
python="$environment/bin/python"
export PATH="$environment/bin:$PATH"

if "$python" -c 'import horovod.torch' 2>/dev/null; then
    echo "Horovod is already built against $("$python" -c 'import torch; print("torch", torch.__version__)')"
    exit 0
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1
export HOROVOD_WITH_GLOO=1 HOROVOD_WITHOUT_MPI=1 CMAKE_POLICY_VERSION_MINIMUM=3.5
# A CUDA torch gets NCCL too where the toolkit is installed; HOROVOD_GPU_OPERATIONS=NCCL is the caller's choice.

"$python" -m pip download --quiet --no-deps --no-binary horovod --no-build-isolation \
    --dest "$work" "horovod==$version"
echo "$sha256  $work/horovod-$version.tar.gz" | sha256sum --check --quiet
tar -xzf "$work/horovod-$version.tar.gz" -C "$work"
sed -i 's/CMAKE_CXX_STANDARD 14/CMAKE_CXX_STANDARD 20/' \
    "$work/horovod-$version/CMakeLists.txt" "$work/horovod-$version/horovod/torch/CMakeLists.txt"
MAKEFLAGS="-j$(nproc)" "$python" -m pip install --quiet --no-deps --no-build-isolation "$work/horovod-$version"
"$python" -c 'import horovod.torch as hvd; assert hvd.gloo_built(); print("Horovod is ready")'
