"""Check that GPU, driver and TensorRT fit the engines."""

import ctypes
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bertqa.hardware import AMPERE
from bertqa.manifest import Manifest
from bertqa.triton_config import Serving
from service.commands.doctor.finding import Finding
from service.commands.doctor.triton_installation import numbers

_NVIDIA_SMI_S = 20.0


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU, as described by ``nvidia-smi``."""

    name: str
    driver: str
    capability: str


def check_gpus(
    manifests: Mapping[str, Manifest], serving: Mapping[str, Serving], *, is_here: bool
) -> Iterator[Finding]:
    """Compare each engine with the GPUs that it is configured for.

    Args:
        manifests: of the loaded versions, by model and version.
        serving: of each model.
        is_here: whether Triton runs on this machine.
    """
    engines = {name: manifest for name, manifest in manifests.items() if manifest.served.processor == "GPU"}
    if not engines:
        yield Finding("ok", "GPU", "not needed")
        return
    if not is_here:
        yield Finding("ok", "GPU", "not checked, because Triton runs elsewhere; run the doctor there too")
        return
    devices = _devices()
    if not devices:
        yield Finding(
            "FAIL",
            "GPU",
            f"nvidia-smi finds none, but {next(iter(engines))} needs one",
            "install NVIDIA's driver (and its container toolkit), or build with --target cpu",
        )
        return
    for name, manifest in engines.items():
        wanted = serving[name.split()[0]].gpus or range(len(devices))
        yield from _check_engine(name, manifest.runtime, wanted, devices)
        if "tensorrt" in manifest.runtime:
            yield check_tensorrt(name, manifest.runtime)


def _check_engine(
    name: str, built: Mapping[str, str], wanted: Sequence[int], devices: Sequence[Device]
) -> Iterator[Finding]:
    if missing := [number for number in wanted if number >= len(devices)]:
        text = f"{name} is configured for GPU {missing[0]}, but the number of GPUs is {len(devices)}"
        yield Finding("FAIL", "GPU", text, "build it with other --gpus")
    for device in (devices[number] for number in wanted if number < len(devices)):
        yield _compare(name, built, device)
        if numbers(device.driver) < numbers(built.get("driver", "0")):
            text = f"{device.driver} is older than {built['driver']}, which {name} was built under"
            yield Finding("WARN", "driver", text)


def _compare(name: str, built: Mapping[str, str], device: Device) -> Finding:
    capability = built.get("compute_capability", "")
    if "hardware_compatible" not in built or numbers(device.capability) < AMPERE:
        if device.capability != capability:
            return Finding(
                "FAIL",
                "GPU",
                f"{device.name} has compute capability {device.capability}, but {name} was built for {capability} "
                f"({built.get('gpu', 'another GPU')})",
                "build it again on this machine",
            )
        if device.name != built.get("gpu"):
            return Finding(
                "WARN",
                "GPU",
                f"{device.name} differs from {built.get('gpu', 'the GPU')}, which {name} was built on: it may "
                "be slow or fail",
                "build it again on this machine, or with --hardware-compatible",
            )
    return Finding("ok", "GPU", f"{device.name}, compute capability {device.capability}, as {name} needs")


def _devices() -> list[Device]:
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_NVIDIA_SMI_S, check=False)
    if done.returncode:
        return []
    return [Device(*map(str.strip, line.split(","))) for line in done.stdout.splitlines()]


def check_tensorrt(name: str, runtime: Mapping[str, str]) -> Finding:
    """Compare the TensorRT of this machine with the one that an engine was built with."""
    found, built = _tensorrt_version(), runtime["tensorrt"]
    if found is None:
        text = f"no libnvinfer found, so its version is unknown; {name} needs {built}"
        return Finding("WARN", "TensorRT", text, "run the doctor in Triton's image")
    is_later = found[0] == numbers(built)[0] and found > numbers(built)
    version = ".".join(map(str, found))
    if found != numbers(built) and not (is_later and "version_compatible" in runtime):
        return Finding(
            "FAIL",
            "TensorRT",
            f"is {version}, but {name} was built with {built}",
            "build it again with the builder of Triton's release",
        )
    flag = ", and --backend-config=tensorrt,version-compatible=true" if "version_compatible" in runtime else ""
    return Finding("ok", "TensorRT", f"{version}, as {name} needs{flag}")


def _tensorrt_version() -> tuple[int, ...] | None:
    for library in ("libnvinfer.so.11", "libnvinfer.so.10", "libnvinfer.so"):
        try:
            number = int(ctypes.CDLL(library).getInferLibVersion())
        except (OSError, AttributeError):
            continue
        # 100201 is 10.2.1; before version 10, 8601 is 8.6.1
        major = 10_000 if number >= 100_000 else 1_000
        return number // major, number % major // 100, number % 100
    return None
