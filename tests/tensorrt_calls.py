"""The builder's calls to TensorRT, made on autospecs of the real types of whichever version can be imported.

A program of its own, because a process can hold one TensorRT only: ``test_tensorrt_build`` runs it with each. It shows
that every name exists, what is passed to it, and that no flag is set; not that TensorRT builds anything.
"""

import json
import re
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, create_autospec, patch

import polygraphy.cuda
import tensorrt as trt
from polygraphy.backend.trt import EngineBytesFromNetwork, EngineFromBytes, NetworkFromOnnxPath

from bertqa.windows import INPUT_NAMES
from engine_builder.tensorrt_build import TensorRTOptions, _runners, builder_config

BUCKETS = (64, 128)


def spec(kind: type, **attributes: Any) -> MagicMock:
    """An object with the names of a TensorRT type and no others, whose methods take its arguments and no others."""
    made: MagicMock = create_autospec(kind, instance=True, spec_set=True)
    for name in dir(kind):
        signature = (getattr(kind, name).__doc__ or "").partition("\n")[0]
        if not name.startswith("_") and re.match(rf"{name}\(self: ", signature):
            getattr(made, name).side_effect = _checks(name, re.findall(r"[(,] \*?(\w+): ", signature))
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def _checks(name: str, parameters: list[str]) -> Any:
    def check(*args: Any, **kwargs: Any) -> Any:
        assert len(args) + len(kwargs) <= len(parameters), f"{name} takes {parameters}"
        assert kwargs.keys() <= set(parameters[len(args) :]), f"{name} takes {parameters}"
        return returned[name]() if name in returned else MagicMock()

    return check


returned: dict[str, Any] = {}


def build(graph: Path, plan: bytes, options: TensorRTOptions) -> dict[str, Any]:
    """What `tensorrt_build.build` has TensorRT do, and what TensorRT was told."""
    inputs = [
        spec(trt.ITensor, name=name, shape=(-1, -1), dtype=trt.int32, is_shape_tensor=False) for name in INPUT_NAMES
    ]
    network = spec(trt.INetworkDefinition, num_inputs=len(inputs))
    network.get_input.side_effect = inputs.__getitem__
    network.__getitem__.side_effect = IndexError  # it has no layers
    network.__len__.return_value = 0
    config = spec(trt.IBuilderConfig)
    if hasattr(config, "int8_calibrator"):  # of version 10
        config.int8_calibrator = None
    builder = spec(trt.Builder)
    builder.build_serialized_network.side_effect = lambda *_: plan
    profiles: list[MagicMock] = []

    def profile() -> MagicMock:
        profiles.append(spec(trt.IOptimizationProfile))
        return profiles[-1]

    timing_cache = spec(trt.ITimingCache)
    written = MagicMock()
    written.__enter__.return_value = b"after"
    returned.update(
        get_timing_cache=lambda: timing_cache,
        serialize=lambda: written,
        create_network=lambda: network,
        create_builder_config=lambda: config,
        create_optimization_profile=profile,
    )
    parser = spec(trt.OnnxParser, num_errors=0)
    with (
        patch.object(trt, "Builder", return_value=builder),
        patch.object(trt, "OnnxParser", return_value=parser),
        patch("polygraphy.backend.trt.util.str_from_config", return_value=""),  # for its log
    ):
        loader = NetworkFromOnnxPath(str(graph), strongly_typed=True)
        cache = str(options.timing_cache) if options.timing_cache else None
        built = EngineBytesFromNetwork(loader, config=builder_config(BUCKETS, options), save_timing_cache=cache)()
    (network_call,) = builder.create_network.call_args_list
    (flag,) = network_call.kwargs.values()
    return {
        "version": trt.__version__,
        "built": built.decode(),
        "strongly_typed_alone": flag == 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED),
        "parsed": [Path(call.args[0]).name for call in parser.parse_from_file.call_args_list],
        "flags": [call.args[0].name for call in config.set_flag.call_args_list],
        "profiles": [[list(call.args) for call in each.set_shape.call_args_list] for each in profiles],
        "added": config.add_optimization_profile.call_count,
        "level": config.builder_optimization_level,
        "hardware": config.hardware_compatibility_level.name,
        "timing_caches": [bytes(call.args[0]).decode() for call in config.create_timing_cache.call_args_list],
        "timing_cache": options.timing_cache.read_text() if options.timing_cache else None,
    }


def run(plan: bytes) -> list[list[int]]:
    """The profile that the runner of each bucket sets."""
    contexts = [spec(trt.IExecutionContext) for _ in BUCKETS]
    runtime, engine = spec(trt.Runtime), spec(trt.ICudaEngine)
    engine.create_execution_context.side_effect = contexts
    runtime.deserialize_cuda_engine.return_value = engine
    stream = MagicMock(ptr=7)
    with (
        patch.object(trt, "Runtime", return_value=runtime),
        patch.object(polygraphy.cuda, "Stream", return_value=stream),
        patch("polygraphy.backend.trt.runner.cuda.Stream", return_value=stream),
        ExitStack() as stack,
    ):
        runners = _runners(EngineFromBytes(plan)(), BUCKETS, stack)
        assert [*runners] == [*BUCKETS]
    return [list(call.args) for each in contexts for call in each.set_optimization_profile_async.call_args_list]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        cache = Path(directory) / "timing.cache"
        cache.write_bytes(b"before")
        told = build(
            Path(sys.argv[1]),
            b"plan",
            TensorRTOptions(
                max_batch_size=4,
                optimization_level=5,
                timing_cache=cache,
                version_compatible=True,
                hardware_compatible=True,
            ),
        )
    print(json.dumps({**told, "set": run(b"plan")}))
