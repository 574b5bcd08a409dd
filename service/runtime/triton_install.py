"""Find a Triton server on this machine.

The server is ``tritonserver`` on PATH with its own backends, or else the one inside the ``nvidia-pytriton`` wheel. Only
files of the wheel are used: nothing of the package is imported, so none of its dependencies are needed.
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
    """Triton cannot be found, started, or made to load the model; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class TritonInstallation:
    """A server binary and what it needs around it."""

    binary: Path
    backends: Path | None  # None: the binary knows its own
    environment: Mapping[str, str]  # in addition to the process's own


def find_triton(cache: Path) -> TritonInstallation:
    """Find a Triton server: ``tritonserver`` on PATH, else the one in the ``nvidia-pytriton`` wheel.

    Args:
        cache: directory in which a backend directory for the wheel's server is put together.

    Raises:
        TritonError: there is none, or the wheel has no Python backend for this Python.
    """
    on_path = shutil.which("tritonserver")
    if on_path:
        # Its Python backend takes the packages of the first python3 on PATH: let that be this environment's.
        path = os.pathsep.join([str(Path(sys.prefix) / "bin"), os.environ.get("PATH", "")])
        return TritonInstallation(Path(on_path), None, {"PATH": path})
    try:
        root = Path(str(importlib.metadata.distribution(WHEEL).locate_file("pytriton/tritonserver")))
    except importlib.metadata.PackageNotFoundError:
        root = Path("/nonexistent")
    binary = root / "bin" / "tritonserver"
    if not binary.is_file():
        raise TritonError(
            f"no Triton server: neither tritonserver on PATH nor the {WHEEL} wheel in {sys.prefix}; "
            f"run `{INSTALL}`, or give the address of a running one with --triton-url"
        )
    stub = root / "python_backend_stubs" / _PYTHON / "triton_python_backend_stub"
    if not stub.is_file():
        there = sorted((path.name for path in stub.parent.parent.iterdir()), key=lambda name: int(name.split(".")[1]))
        raise TritonError(
            f"the {WHEEL} wheel runs models with Python {', '.join(there)}, this is Python {_PYTHON}; make the virtual "
            "environment with one of those"
        )
    python_backend = root / "backends" / "python"
    backends = cache / "backends"
    _link(backends / "python", [*python_backend.glob("*.so"), *python_backend.glob("*.py")])
    # While it starts, the stub waits for its server without end, even for one that is gone.
    starter = backends / "python" / stub.name
    starter.write_text(_STUB_STARTER.format(stub=shlex.quote(str(stub.resolve()))))
    starter.chmod(0o755)
    if not os.access(starter, os.X_OK):  # a directory for temporary files may be mounted noexec
        starter.unlink()
        starter.symlink_to(stub.resolve())
    _link(cache / "lib", [_libpython()])
    libraries = [cache / "lib", root.parent.parent / "nvidia_pytriton.libs", os.environ.get("LD_LIBRARY_PATH", "")]
    environment = {
        "LD_LIBRARY_PATH": os.pathsep.join(str(path) for path in libraries if str(path)),
        # The stub embeds Python and takes its home and packages from the python3 that comes first on PATH, virtual
        # environments included; it ignores PYTHONHOME and PYTHONPATH.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "PYTHONUNBUFFERED": "1",
    }
    return TritonInstallation(binary, backends, environment)


def _libpython() -> Path:
    """The shared library that the stub is linked with, of the running Python."""
    name = f"libpython{_PYTHON}.so.1.0"
    directories = [sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("LIBPL"), f"{sys.base_prefix}/lib"]
    multiarch = sysconfig.get_config_var("MULTIARCH")
    directories += [f"{lib}/{multiarch}" for lib in ("/usr/lib", "/lib") if multiarch]
    for directory in filter(None, directories):
        if (Path(directory) / name).is_file():
            return Path(directory) / name
    raise TritonError(
        f"{name} is missing, and Triton runs Python models with it; Debian and Ubuntu have it in libpython{_PYTHON} "
        f"(`apt install libpython{_PYTHON}`), pyenv builds it with PYTHON_CONFIGURE_OPTS=--enable-shared"
    )


def _link(directory: Path, targets: Sequence[Path]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for target in targets:
        (directory / target.name).symlink_to(target.resolve())
