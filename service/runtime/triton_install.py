"""Find a Triton server on this machine.

The server is ``tritonserver`` on PATH with its own backends, or the one inside the ``nvidia-pytriton`` wheel. Only the
files of the wheel are used. The package is not imported, so its dependencies are not needed.
"""

import importlib.metadata
import os
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

WHEEL = "nvidia-pytriton"
INSTALL = f"python -m pip install --no-deps --constraint constraints.txt {WHEEL}"

_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"

_STUB_STARTER = """\
#!/bin/sh
stub=$$
{{ tail --pid="$PPID" -s 0.5 -f /dev/null; kill -9 "$stub"; }} 2>/dev/null &
exec {stub} "$@"
"""


class TritonError(RuntimeError):
    """Triton was not found, did not start, or did not load the model; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class TritonInstallation:
    """A server binary and its environment."""

    binary: Path
    backends: Path | None  # None: the default of the binary
    environment: Mapping[str, str]  # added to the process's environment


def find_triton(cache: Path) -> TritonInstallation:
    """Find a Triton server: ``tritonserver`` on PATH, else the one in the ``nvidia-pytriton`` wheel.

    Args:
        cache: directory where the backends for the wheel's server are assembled.

    Raises:
        TritonError: no server was found, or the wheel has no Python backend for this Python.
    """
    on_path = shutil.which("tritonserver")
    if on_path:
        # Its Python backend uses the packages of the first python3 on PATH, so put this environment first.
        path = os.pathsep.join([str(Path(sys.prefix) / "bin"), os.environ.get("PATH", "")])
        return TritonInstallation(Path(on_path), None, {"PATH": path})
    try:
        root = Path(str(importlib.metadata.distribution(WHEEL).locate_file("pytriton/tritonserver")))
    except importlib.metadata.PackageNotFoundError:
        root = Path("/nonexistent")
    binary = root / "bin" / "tritonserver"
    if not binary.is_file():
        raise TritonError(
            f"no Triton server: found neither tritonserver on PATH nor the {WHEEL} wheel in {sys.prefix}; "
            f"run `{INSTALL}`, or give the address of a running Triton with --triton-url"
        )
    stub = root / "python_backend_stubs" / _PYTHON / "triton_python_backend_stub"
    if not stub.is_file():
        there = sorted((path.name for path in stub.parent.parent.iterdir()), key=lambda name: int(name.split(".")[1]))
        raise TritonError(
            f"the {WHEEL} wheel runs models with Python {', '.join(there)}, but this is Python {_PYTHON}; create the "
            "virtual environment with one of those"
        )
    python_backend = root / "backends" / "python"
    backends = cache / "backends"
    _link(backends / "python", [*python_backend.glob("*.so"), *python_backend.glob("*.py")])
    # During its start, the stub waits for its server forever, even if the server has ended.
    starter = backends / "python" / stub.name
    starter.write_text(_STUB_STARTER.format(stub=shlex.quote(str(stub.resolve()))))
    starter.chmod(0o755)
    if not os.access(starter, os.X_OK):  # the temporary directory may be mounted noexec
        starter.unlink()
        starter.symlink_to(stub.resolve())
    _link(cache / "lib", [_libpython()])
    libraries = [cache / "lib", root.parent.parent / "nvidia_pytriton.libs", os.environ.get("LD_LIBRARY_PATH", "")]
    environment = {
        "LD_LIBRARY_PATH": os.pathsep.join(str(path) for path in libraries if str(path)),
        # The stub embeds Python. It takes home and packages from the first python3 on PATH, even in a virtual
        # environment, and ignores PYTHONHOME and PYTHONPATH.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "PYTHONUNBUFFERED": "1",
    }
    return TritonInstallation(binary, backends, environment)


def _libpython() -> Path:
    """Return the shared library of the running Python, which the stub is linked with."""
    name = f"libpython{_PYTHON}.so.1.0"
    directories = [sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("LIBPL"), f"{sys.base_prefix}/lib"]
    multiarch = sysconfig.get_config_var("MULTIARCH")
    directories += [f"{lib}/{multiarch}" for lib in ("/usr/lib", "/lib") if multiarch]
    for directory in filter(None, directories):
        if (Path(directory) / name).is_file():
            return Path(directory) / name
    raise TritonError(
        f"{name} is missing, which Triton needs to run Python models; on Debian and Ubuntu run `apt install "
        f"libpython{_PYTHON}`, with pyenv build Python with PYTHON_CONFIGURE_OPTS=--enable-shared"
    )


def _link(directory: Path, targets: Sequence[Path]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for target in targets:
        (directory / target.name).symlink_to(target.resolve())
