"""Build a TensorRT engine with Polygraphy, with one optimization profile per length bucket.

This supports TensorRT 10 and 11. The graph states the type of every tensor (`engine_builder.architectures`) and the
network is strongly typed, so no precision flags are set: version 11 has none, and takes int8 and fp8 from the graph.
Each profile has a single length, so that TensorRT chooses kernels for it; windows are padded to these lengths. NVIDIA's
packages are imported on first use, so that a machine without them can build for the CPU.
"""

import ctypes
import importlib
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import onnx

from bertqa.hardware import AMPERE
from bertqa.manifest import sha256_of
from bertqa.spans import Logits
from bertqa.windows import INPUT_NAMES, OUTPUT_NAMES, Window
from engine_builder.architectures import build_graph
from engine_builder.architectures.graph import FloatType
from engine_builder.engine import Engine, EngineOptions, Source, percentiles
from engine_builder.publish import BuildRefused
from engine_builder.quantization import QuantizedType, calibrate

Precision = Literal["fp16", "bf16", "int8", "fp8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
DEFAULT_PRECISION: Precision = "fp16"
CALIBRATED: tuple[QuantizedType, ...] = get_args(QuantizedType)

ENGINE_FILE = "model.plan"  # the name that Triton looks for
OPTIMIZATION_LEVELS = range(6)
MAX_BATCH_SIZE = 256

_CAPABILITY: dict[Precision, tuple[int, int]] = {"fp16": (7, 5), "int8": (7, 5), "bf16": (8, 0), "fp8": (8, 9)}
"""Lowest compute capability with tensor cores for a type; TensorRT 10 and 11 always need at least 7.5."""
_WARM_UP_CALLS, _CALLS = 100, 500
_PCI_DEVICES = Path("/sys/bus/pci/devices")
_NVIDIA = "0x10de"


class TensorRT:
    """TensorRT on an NVIDIA GPU, in Triton's TensorRT backend; see `engine_builder.targets.Target`."""

    precisions: Sequence[str] = PRECISIONS
    calibrated = frozenset[str](CALIBRATED)
    uncalibrated: str = DEFAULT_PRECISION
    own_options = frozenset({"gpus", "optimization_level", "timing_cache", "version_compatible", "hardware_compatible"})

    def default_precision(self) -> str:
        """Return the fastest precision that needs no calibration."""
        return DEFAULT_PRECISION

    def diagnose(self) -> Mapping[str, str]:
        """See `missing_parts`."""
        return missing_parts()

    def check_machine(self, precision: str, options: EngineOptions) -> str:
        """Refuse what TensorRT, the driver or the GPU does not support; see `Target`."""
        cache, wanted = options.timing_cache, cast(Precision, precision)
        if cache and not cache.absolute().parent.is_dir():
            raise BuildRefused(f"--timing-cache {cache}: the directory does not exist")
        if missing := missing_parts():
            parts = "".join(f"\n  - {part}: {fix}" for part, fix in missing.items())
            raise BuildRefused(f"--target tensorrt: this machine lacks:{parts}\n--target cpu works here")
        from cuda.core import Device  # noqa: PLC0415

        device = Device()
        found = (device.compute_capability.major, device.compute_capability.minor)
        if found < (needed := _CAPABILITY[wanted]):
            able = [name for name, least in _CAPABILITY.items() if least <= found]
            raise BuildRefused(
                f"--precision {precision}: {device.name} has compute capability {_dotted(found)}, and "
                f"{_dotted(needed)} is needed; {' and '.join(able) or 'nothing'} would work"
            )
        if options.hardware_compatible and found < AMPERE:
            raise BuildRefused(
                f"--hardware-compatible: {device.name} has compute capability {_dotted(found)}, and TensorRT builds "
                f"for other GPUs from {_dotted(AMPERE)} on"
            )
        return precision

    def build(
        self, source: Source, directory: Path, precision: str, options: EngineOptions, stack: ExitStack
    ) -> Engine:
        """Build and load the engine, and write the graph next to the directory; see `Target`."""
        from polygraphy.backend.trt import EngineBytesFromNetwork, EngineFromBytes, NetworkFromOnnxPath  # noqa: PLC0415
        from polygraphy.exception import PolygraphyException  # noqa: PLC0415
        from polygraphy.logger import G_LOGGER  # noqa: PLC0415

        G_LOGGER.module_severity = G_LOGGER.WARNING
        _load_cuda_runtime()
        runtime = _runtime(options)  # fails before minutes of building if versions are unknown
        graph = directory.parent / "typed.onnx"
        onnx.save(typed_graph(source, cast(Precision, precision)), graph)
        plan = directory / ENGINE_FILE
        cache = str(options.timing_cache) if options.timing_cache else None
        try:
            engine_bytes = EngineBytesFromNetwork(
                NetworkFromOnnxPath(str(graph), strongly_typed=True),
                config=builder_config(source.buckets, options),
                save_timing_cache=cache,
            )()
            plan.write_bytes(engine_bytes)
            engine = EngineFromBytes(plan.read_bytes())()
            runners = _runners(engine, source.buckets, stack)
        except PolygraphyException as error:
            raise BuildRefused(f"--target tensorrt: TensorRT could not build the engine: {error}") from error
        return Engine(
            file=ENGINE_FILE,
            sha256=sha256_of(plan),
            onnx_sha256=sha256_of(graph),
            runtime=runtime,
            predict=partial(_predict, runners),
            latency=partial(_latency, runners),
            max_batch_size=options.max_batch_size,
        )


def missing_parts() -> dict[str, str]:
    """Return what this machine lacks to build an engine, and how to get it; empty if nothing is missing."""
    missing = {}
    for module, package in (("polygraphy", "polygraphy"), ("cuda.core", "cuda-core")):
        try:
            importlib.import_module(module)
        except ImportError:
            install = "pip install --constraint constraints.txt --editable '.[tensorrt]'"
            missing[f"the Python package {package}"] = install
    fix = "build in NVIDIA's TensorRT container of Triton's release, or pip install tensorrt"
    try:
        tensorrt = importlib.import_module("tensorrt")
        if int(tensorrt.__version__.split(".")[0]) < 10:
            missing["TensorRT 10 or 11"] = f"this is {tensorrt.__version__}; {fix}"
    except (ImportError, OSError) as error:
        missing["TensorRT (libnvinfer)"] = f"{error}; {fix}"
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        missing["the CUDA driver (libcuda)"] = "install NVIDIA's driver, or start the container with --gpus all"
        vendors = [path.read_text().strip() for path in _PCI_DEVICES.glob("*/vendor")]
        if _NVIDIA not in vendors:
            missing["a GPU"] = "there is no NVIDIA device on the PCI bus"
    else:
        count = ctypes.c_int(0)
        status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
        if status or not count.value:
            reason = f"CUDA error {status}" if status else "it counts 0"
            missing["a GPU"] = f"the driver shows none ({reason}); see CUDA_VISIBLE_DEVICES"
    return missing


def typed_graph(source: Source, precision: Precision) -> onnx.ModelProto:
    """Write the graph to build from; the floating-point parts of int8 and fp8 are float16."""
    float_type: FloatType = "bfloat16" if precision == "bf16" else "float16"
    quantization = None
    if precision in CALIBRATED:
        quantization = calibrate(source.reference, source.weights, source.calibration, precision)
    return build_graph(source.architecture, source.weights, float_type, quantization)


def builder_config(buckets: Sequence[int], options: EngineOptions) -> Callable[..., Any]:
    """Create Polygraphy's builder configuration; profile n is for bucket n."""
    import tensorrt  # noqa: PLC0415
    from polygraphy.backend.trt import CreateConfig, Profile  # noqa: PLC0415

    largest = options.max_batch_size
    profiles = []
    for length in buckets:
        profile = Profile()
        for name in INPUT_NAMES:
            profile.add(name, min=(1, length), opt=(largest, length), max=(largest, length))
        profiles.append(profile)
    cache = options.timing_cache
    return CreateConfig(  # type: ignore[no-any-return]
        profiles=profiles,
        load_timing_cache=str(cache) if cache and cache.exists() else None,
        builder_optimization_level=options.optimization_level,
        version_compatible=options.version_compatible,
        hardware_compatibility_level=(
            tensorrt.HardwareCompatibilityLevel.AMPERE_PLUS if options.hardware_compatible else None
        ),
        profiling_verbosity=tensorrt.ProfilingVerbosity.LAYER_NAMES_ONLY,
    )


def _runners(engine: Any, buckets: Sequence[int], stack: ExitStack) -> dict[int, Any]:
    """Create a runner for each bucket, with its profile selected."""
    from polygraphy.backend.trt import TrtRunner  # noqa: PLC0415

    return {length: stack.enter_context(TrtRunner(engine, optimization_profile=n)) for n, length in enumerate(buckets)}


def _predict(runners: Mapping[int, Any], window: Window) -> Logits:
    found = runners[window.length].infer(window.tensors())
    start, end = (np.array(found[name]) for name in OUTPUT_NAMES)  # copied: the next call overwrites the memory
    return start, end


def _latency(runners: Mapping[int, Any], windows: Sequence[Window]) -> dict[str, float]:
    """Measure percentiles of the GPU time of one window, without copies; "graph_p50" and so on use a CUDA graph."""
    from cuda.core import Device, EventOptions, Stream  # noqa: PLC0415

    runner = runners[windows[0].length]
    Device().set_current()
    stream = Stream.from_handle(runner.stream.ptr)
    runner.infer(windows[0].tensors())  # the input stays on the GPU

    def execute() -> None:
        if not runner.context.execute_async_v3(runner.stream.ptr):
            raise BuildRefused("--target tensorrt: the engine did not run a second time; TensorRT's error is above")

    def milliseconds(call: Callable[[], object]) -> list[float]:
        for _ in range(_WARM_UP_CALLS):
            call()
        times = []
        for _ in range(_CALLS):
            started = stream.record(options=EventOptions(timing_enabled=True))
            call()
            ended = stream.record(options=EventOptions(timing_enabled=True))
            ended.sync()
            times.append(float(ended - started))
        return times

    plain = percentiles(milliseconds(execute))
    capture = stream.create_graph_builder().begin_building("thread_local")
    execute()
    graph = capture.end_building().complete()
    return plain | percentiles(milliseconds(lambda: graph.launch(stream)), "graph_")


def _runtime(options: EngineOptions) -> dict[str, str]:
    import tensorrt  # noqa: PLC0415
    from cuda.core import Device, system  # noqa: PLC0415

    device = Device()
    capability = device.compute_capability
    facts = {
        "python": platform.python_version(),
        "tensorrt": tensorrt.__version__,
        "cuda": _dotted(system.get_user_mode_driver_version()),
        "driver": _dotted(system.get_kernel_mode_driver_version()),
        "gpu": device.name,
        "compute_capability": _dotted((capability.major, capability.minor)),
    }
    facts |= {name: version_of(name) for name in ("polygraphy", "onnxruntime", "onnx")}
    # Triton loads version-compatible engines only with --backend-config=tensorrt,version-compatible=true
    return facts | {name: "true" for name in ("version_compatible", "hardware_compatible") if getattr(options, name)}


def _load_cuda_runtime() -> None:
    """Have Polygraphy load the CUDA runtime, which it does not find in the pip packages of CUDA 13.

    Raises:
        BuildRefused: there is no CUDA runtime, or the driver is too old for it.
    """
    from cuda.core import system  # noqa: PLC0415
    from cuda.pathfinder import DynamicLibNotFoundError, load_nvidia_dynamic_lib  # noqa: PLC0415
    from polygraphy import cuda  # noqa: PLC0415

    with suppress(DynamicLibNotFoundError):
        if found := load_nvidia_dynamic_lib("cudart").abs_path:
            os.environ["LD_LIBRARY_PATH"] = os.pathsep.join(
                [str(Path(found).parent), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
            )
    try:
        library = cuda.wrapper().handle
    except OSError as error:
        raise BuildRefused(
            f"--target tensorrt needs the CUDA runtime: {error}; pip install nvidia-cuda-runtime, or build in NVIDIA's "
            "container"
        ) from error
    version = ctypes.c_int(0)  # 13030 is 13.3
    library.cudaRuntimeGetVersion(ctypes.byref(version))
    runtime, driver = (version.value // 1000, version.value % 1000 // 10), system.get_user_mode_driver_version()
    if runtime[0] > driver[0]:
        raise BuildRefused(
            f"--target tensorrt: the driver supports CUDA up to {_dotted(driver)}, but the CUDA runtime is "
            f"{_dotted(runtime)}; install a newer driver (580 is the first for CUDA 13)"
        )


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))
