#!/usr/bin/env bash
# Build Horovod 0.28.1 (PyTorch, Gloo, and NCCL for a CUDA torch) into the Python environment given as $1 (default: .venv).
#
# The last release predates torch 2.1, whose headers need C++17; those of torch 2.13 need C++20. The sdist asks for
# C++14 (horovod#3996) and, for its one CUDA kernel, C++11; recent CMake also refuses its policy version. All are one-word
# patches. torch, setuptools and cmake must already be in the environment: the extension links against that torch, and
# with CUDA against the NCCL that torch loads. nvcc of torch's CUDA version must be on PATH.
# HOROVOD_BUILD_CUDA_CC_LIST lists compute capabilities ("80,90"); the default is all current ones.
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

cuda=$("$python" -c 'import torch; print(torch.version.cuda or "")')
if [ -n "$cuda" ]; then
    if ! nvcc --version 2>/dev/null | grep -q "release $cuda,"; then
        echo "torch is built for CUDA $cuda, so Horovod's kernel needs nvcc $cuda on PATH: install that CUDA toolkit," \
            "or the CPU build of torch (TORCH_INDEX=https://download.pytorch.org/whl/cpu)" >&2
        exit 1
    fi
    # torch's NCCL wheel has libnccl.so.2 but not the name that a linker looks for.
    nccl=$("$python" -c 'import nvidia.nccl; print(nvidia.nccl.__path__[0])')
    ln -s "$nccl/lib/libnccl.so.2" "$work/libnccl.so"
    export HOROVOD_GPU_OPERATIONS=NCCL HOROVOD_NCCL_LINK=shared
    export HOROVOD_NCCL_INCLUDE="$nccl/include" HOROVOD_NCCL_LIB="$work"
    export HOROVOD_BUILD_CUDA_CC_LIST="${HOROVOD_BUILD_CUDA_CC_LIST:-75,80,86,89,90,100,120}"
fi

"$python" -m pip download --quiet --no-deps --no-binary horovod --no-build-isolation \
    --dest "$work" "horovod==$version"
echo "$sha256  $work/horovod-$version.tar.gz" | sha256sum --check --quiet
tar -xzf "$work/horovod-$version.tar.gz" -C "$work"
source="$work/horovod-$version"
sed -i 's/CMAKE_CXX_STANDARD 14/CMAKE_CXX_STANDARD 20/' "$source/CMakeLists.txt" "$source/horovod/torch/CMakeLists.txt"
sed -i 's/CMAKE_CUDA_STANDARD 11/CMAKE_CUDA_STANDARD 17/' "$source/horovod/common/ops/cuda/CMakeLists.txt"
MAKEFLAGS="-j$(nproc)" "$python" -m pip install --quiet --no-deps --no-build-isolation "$source"
"$python" - <<'PYTHON'
import horovod.torch as hvd
import torch

assert hvd.gloo_built()
assert hvd.nccl_built() or torch.version.cuda is None
print("Horovod is ready, with Gloo" + (" and NCCL" if torch.version.cuda else ""))
PYTHON
