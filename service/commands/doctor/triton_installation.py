"""Check that a Triton is installed, runs on this machine, and supports the engines."""

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from bertqa.manifest import Manifest
from service.commands.doctor.finding import Finding
from service.runtime.ports import LOOPBACK, free_port
from service.runtime.triton_install import TritonError, TritonInstallation, find_triton

BACKENDS = Path("/opt/tritonserver/backends")
"""Default directory of Triton's backends."""


def check_triton_installation(manifests: Mapping[str, Manifest]) -> Iterator[Finding]:
    """Find Triton, start it briefly, and check for the backends of the loaded versions."""
    with tempfile.TemporaryDirectory(prefix="bertqa-doctor-") as directory:
        try:
            found = find_triton(Path(directory))
            version = _version(found, Path(directory))
        except TritonError as error:
            yield Finding("FAIL", "Triton", str(error))
            return
    for name, manifest in manifests.items():
        backend = manifest.served.backend
        if (
            backend != "python" and not ((found.backends or BACKENDS) / backend).is_dir()
        ):  # every Triton has the Python backend
            yield Finding(
                "FAIL",
                "Triton",
                f"{found.binary} has no backend {backend!r}, which {name} needs",
                "use the Triton of NVIDIA's image, or build with --target cpu",
            )
            return
    yield check_triton_version("Triton", version, str(found.binary), manifests)


def check_triton_version(subject: str, version: str, where: str, manifests: Mapping[str, Manifest]) -> Finding:
    """Compare a Triton's version with those that the loaded versions support."""
    for name, manifest in manifests.items():
        lowest, highest = manifest.triton
        if (lowest and numbers(version) < numbers(lowest)) or (highest and numbers(version) > numbers(highest)):
            wanted = f"from {lowest or 'any'} to {highest or 'any'}"
            text = f"{where} is {version}, but {name} needs {wanted}"
            return Finding("FAIL", subject, text, "install one of these versions")
    return Finding("ok", subject, f"{where}, {version}")


def numbers(version: str) -> tuple[int, ...]:
    """Return the first three numbers of a version, for comparison."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _version(found: TritonInstallation, directory: Path) -> str:
    """Start a server without a model, and read its version.

    Raises:
        TritonError: it does not run on this machine.
    """
    (directory / "empty").mkdir()
    command = [str(found.binary), f"--model-repository={directory / 'empty'}"]
    command += ["--allow-grpc=false", "--allow-metrics=false", f"--http-address={LOOPBACK}"]
    command.append(f"--http-port={free_port(LOOPBACK, 0)}")
    if found.backends:
        command.append(f"--backend-directory={found.backends}")
    process = subprocess.Popen(
        command, env={**os.environ, **found.environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines: list[str] = []
    try:
        assert process.stdout
        for line in process.stdout:
            if found_version := re.search(r"server_version\s*\|\s*([\d.]+)", line):
                return found_version[1]
            lines.append(line.strip())
    finally:
        process.kill()
        process.communicate()
    raise TritonError(f"{found.binary} does not run on this machine: {lines[-1] if lines else 'it printed nothing'}")
