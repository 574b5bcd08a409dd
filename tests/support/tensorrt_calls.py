"""Run the TensorRT target end to end on TensorRT's real types, with ONNX Runtime instead of its libraries.

This is a separate program, because a process can load only one TensorRT: ``test_tensorrt_build`` runs it with each. The
whole builder and Polygraphy run; every call on a TensorRT type exists there and takes these arguments. The "engine" is
the graph itself; ONNX Runtime executes it, from and into the given addresses. So this shows that the parts fit
together, but not that TensorRT can build anything.
"""

import ctypes
import json
import re
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, create_autospec, patch

import cuda.core
import numpy as np
import onnxruntime as ort
import polygraphy.cuda.cuda
import tensorrt as trt
from cuda.core.graph import Graph, GraphBuilder

from bertqa.windows import INPUT_NAMES, OUTPUT_NAMES
from engine_builder.build import BuildOptions, build
from engine_builder.targets import tensorrt as target

STREAM = 7
Builder, OnnxParser, Runtime = trt.Builder, trt.OnnxParser, trt.Runtime  # before they are replaced
Handlers = Mapping[str, Callable[..., Any]]


def spec(kind: type, handlers: Handlers, **attributes: Any) -> MagicMock:
    """Create an object with exactly the names of a TensorRT type, whose methods take exactly its arguments.

    Args:
        kind: the TensorRT type.
        handlers: implementations of methods; other methods return a mock.
        attributes: values of the properties.
    """
    made: MagicMock = create_autospec(kind, instance=True, spec_set=True)
    for name in dir(kind):
        signature = (getattr(kind, name).__doc__ or "").partition("\n")[0]
        if not name.startswith("_") and re.match(rf"{name}\(self: ", signature):
            parameters = re.findall(r"[(,] \*?(\w+): ", signature)
            getattr(made, name).side_effect = _checked(
                name, parameters, handlers.get(name, lambda *_, **__: MagicMock())
            )
        elif name in handlers:  # overloaded, or special
            getattr(made, name).side_effect = handlers[name]
    assert handlers.keys() <= set(dir(kind))
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def _checked(name: str, parameters: list[str], handler: Callable[..., Any]) -> Callable[..., Any]:
    def check(*args: Any, **kwargs: Any) -> Any:
        assert len(args) + len(kwargs) <= len(parameters), f"{name} takes {parameters}"
        assert kwargs.keys() <= set(parameters[len(args) :]), f"{name} takes {parameters}"
        return handler(*args, **kwargs)

    return check


class HostMemory:
    """The part of the CUDA runtime that Polygraphy calls, with host memory."""

    def __init__(self) -> None:
        self._blocks: dict[int, Any] = {}
        self.handle = MagicMock(spec=["cudaRuntimeGetVersion"])

    def create_stream(self) -> int:
        return STREAM

    def stream_synchronize(self, stream: int) -> None:
        assert stream == STREAM

    destroy_stream = stream_synchronize

    def malloc(self, size: int) -> int:
        block = ctypes.create_string_buffer(size)
        self._blocks[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def free(self, address: int) -> None:
        self._blocks.pop(address, None)

    def memcpy(self, dst: int, src: int, nbytes: int, kind: object, stream_ptr: int) -> None:
        assert stream_ptr == STREAM
        ctypes.memmove(dst, src, nbytes)


class TensorRT:
    """The engine and runs of one build, with a record of all requests."""

    def __init__(self) -> None:
        self.graph = b""
        self.parsed: list[str] = []
        self.network_flags = 0
        self.flags: list[str] = []
        self.profiles: list[dict[str, list[tuple[int, ...]]]] = []
        self.timing_caches: list[str] = []
        self.used: list[int] = []  # profile of each context
        self.config = self._config()

    def _config(self) -> MagicMock:
        cache = spec(trt.ITimingCache, {"serialize": self._cache, "combine": lambda *_, **__: True})

        def create_timing_cache(begun: bytes) -> MagicMock:
            self.timing_caches.append(bytes(begun).decode())
            return cache

        optional = {  # only in version 10
            name: (lambda *_: False) for name in ("get_quantization_flag",) if hasattr(trt.IBuilderConfig, name)
        }
        config = spec(
            trt.IBuilderConfig,
            {
                "set_flag": lambda flag: self.flags.append(flag.name),
                "get_flag": lambda flag: flag.name in self.flags,
                "create_timing_cache": create_timing_cache,
                "set_timing_cache": lambda *_, **__: True,
                "get_timing_cache": lambda: cache,
                "get_memory_pool_limit": lambda *_: 0,
                "get_tactic_sources": lambda: 0,
                "get_preview_feature": lambda *_: False,
                **optional,
            },
            DLA_core=-1,
            default_device_type=trt.DeviceType.GPU,
            num_optimization_profiles=2,
        )
        if hasattr(config, "int8_calibrator"):  # only in version 10
            config.int8_calibrator = None
        return config

    def _cache(self) -> MagicMock:
        written = MagicMock()
        written.__enter__.return_value = b"after"
        return written

    def builder(self, _: object) -> MagicMock:
        """Stands in for the constructor `trt.Builder`."""
        inputs = [
            spec(trt.ITensor, {}, name=name, shape=(-1, -1), dtype=trt.int32, is_shape_tensor=False)
            for name in INPUT_NAMES
        ]
        network = spec(
            trt.INetworkDefinition,
            {"get_input": inputs.__getitem__, "get_flag": lambda *_: False},
            num_inputs=len(inputs),
        )
        network.__getitem__.side_effect = IndexError  # it has no layers
        network.__len__.return_value = 0

        def create_network(flags: int) -> MagicMock:
            self.network_flags = flags
            return network

        def create_optimization_profile() -> MagicMock:
            shapes: dict[str, list[tuple[int, ...]]] = {}
            self.profiles.append(shapes)
            return spec(
                trt.IOptimizationProfile, {"set_shape": lambda name, *limits: shapes.update({name: [*limits]}) or True}
            )

        return spec(
            Builder,
            {
                "create_network": create_network,
                "create_builder_config": lambda: self.config,
                "create_optimization_profile": create_optimization_profile,
                "build_serialized_network": lambda *_: self.graph,
            },
        )

    def parser(self, *_: object) -> MagicMock:
        """Stands in for the constructor `trt.OnnxParser`."""

        def parse_from_file(path: str) -> bool:
            self.parsed.append(Path(path).name)
            self.graph = Path(path).read_bytes()
            return True

        return spec(OnnxParser, {"parse_from_file": parse_from_file}, num_errors=0)

    def runtime(self, _: object) -> MagicMock:
        """Stands in for the constructor `trt.Runtime`."""
        return spec(Runtime, {"deserialize_cuda_engine": self._engine})

    def _engine(self, plan: bytes) -> MagicMock:
        session = ort.InferenceSession(bytes(plan), providers=["CPUExecutionProvider"])
        names = [*INPUT_NAMES, *OUTPUT_NAMES]
        aliases = {name: (lambda *_: None) for name in ("get_aliased_input_tensor",) if hasattr(trt.ICudaEngine, name)}
        return spec(
            trt.ICudaEngine,
            {
                "create_execution_context": lambda *_: self._context(session),
                "get_tensor_name": names.__getitem__,
                "get_tensor_mode": lambda name: (
                    trt.TensorIOMode.INPUT if name in INPUT_NAMES else trt.TensorIOMode.OUTPUT
                ),
                "get_tensor_dtype": lambda name: trt.int32 if name in INPUT_NAMES else trt.float32,
                "get_tensor_shape": lambda _: (-1, -1),
                "get_tensor_format": lambda *_: trt.TensorFormat.LINEAR,
                "is_shape_inference_io": lambda _: False,
                **aliases,
            },
            num_io_tensors=len(names),
        )

    def _context(self, session: ort.InferenceSession) -> MagicMock:
        place = len(self.used)
        self.used.append(0)
        shapes: dict[str, tuple[int, ...]] = {}
        addresses: dict[str, int] = {}
        allocators: dict[str, Any] = {}

        def set_profile(number: int, stream: int) -> bool:
            assert stream == STREAM
            self.used[place] = number
            return True

        def set_shape(name: str, shape: tuple[int, ...]) -> bool:
            least, _, most = self.profiles[self.used[place]][name]
            shapes[name] = tuple(shape)
            return all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True))

        def execute(stream: int) -> bool:
            assert stream == STREAM
            tensors = {}
            for name in INPUT_NAMES:
                values = (ctypes.c_int32 * int(np.prod(shapes[name]))).from_address(addresses[name])
                tensors[name] = np.ctypeslib.as_array(values).reshape(shapes[name])
            for name, values in zip(OUTPUT_NAMES, session.run(list(OUTPUT_NAMES), tensors), strict=True):
                allocators[name].notify_shape(name, values.shape)
                address = allocators[name].reallocate_output_async(name, 0, values.nbytes, 256, stream)
                ctypes.memmove(address, values.ctypes.data, values.nbytes)
            return True

        return spec(
            trt.IExecutionContext,
            {
                "set_optimization_profile_async": set_profile,
                "set_input_shape": set_shape,
                "get_tensor_shape": lambda name: shapes.get(name, (-1, -1)),
                "set_tensor_address": lambda name, address: addresses.update({name: address}) is None,
                "get_tensor_address": lambda name: addresses.get(name, 0),
                "set_output_allocator": lambda name, allocator: allocators.update({name: allocator}) is None,
                "execute_async_v3": execute,
            },
        )


class Moment(float):
    """A point in time in milliseconds, like a CUDA event."""

    def sync(self) -> None:
        """Return at once, because the host computes synchronously."""


def _cuda(stack: ExitStack) -> tuple[MagicMock, MagicMock]:
    """Replace cuda-core by objects with its names; return the graph builder and the graph."""
    graph, capture = create_autospec(Graph, instance=True), create_autospec(GraphBuilder, instance=True)
    for name in ("begin_building", "end_building"):
        getattr(capture, name).return_value = capture
    capture.complete.return_value = graph
    stream = create_autospec(cuda.core.Stream, instance=True)
    stream.record.side_effect = lambda *, options: Moment(1e3 * time.perf_counter()) if options.timing_enabled else None
    stream.create_graph_builder.return_value = capture
    streams = create_autospec(cuda.core.Stream)
    streams.from_handle.side_effect = {STREAM: stream}.__getitem__
    graph.launch.side_effect = {stream: None}.__getitem__
    device = create_autospec(cuda.core.Device, instance=True)
    device.name, device.compute_capability.major, device.compute_capability.minor = "NVIDIA H100", 9, 0
    for owner, name, made in (
        (cuda.core, "Device", lambda: device),
        (cuda.core, "Stream", streams),
        (cuda.core.system, "get_user_mode_driver_version", lambda: (13, 3)),
        (cuda.core.system, "get_kernel_mode_driver_version", lambda: (580, 65, 6)),
    ):
        stack.enter_context(patch.object(owner, name, made))
    return capture, graph


def main(options: BuildOptions) -> dict[str, Any]:
    """Build; return what TensorRT was asked for, and the manifest."""
    made = TensorRT()
    with ExitStack() as stack:
        capture, graph = _cuda(stack)
        for owner, name, replacement in (
            (target, "missing_parts", dict),
            (target, "_WARM_UP_CALLS", 1),
            (target, "_CALLS", 9),
            (polygraphy.cuda.cuda, "G_CUDA", HostMemory()),
            (trt, "Builder", made.builder),
            (trt, "OnnxParser", made.parser),
            (trt, "Runtime", made.runtime),
        ):
            stack.enter_context(patch.object(owner, name, replacement))
        manifest = build(options)
    strongly_typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    return {
        "manifest": asdict(manifest),
        "strongly_typed_alone": made.network_flags == strongly_typed,
        "parsed": made.parsed,
        "flags": made.flags,
        "profiles": made.profiles,
        "added": made.config.add_optimization_profile.call_count,
        "level": made.config.builder_optimization_level,
        "hardware": getattr(made.config.hardware_compatibility_level, "name", None),
        "timing_caches": made.timing_caches,
        "used": made.used,
        "captures": [call.args for call in capture.begin_building.call_args_list],
        "launches": graph.launch.call_count,
    }


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    for argument in ("repository", "timing_cache"):
        given[argument] = Path(given[argument])
    for precision in sys.argv[2:]:
        print(json.dumps(main(BuildOptions(target="tensorrt", model=precision, precision=precision, **given))))
