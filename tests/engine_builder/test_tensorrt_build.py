"""Test the TensorRT target: its graphs in other runtimes, its calls on real TensorRT types, its engines on a GPU."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from bertqa.manifest import Settings, changed_files
from bertqa.repository import Repository
from bertqa.squad import read_squad
from bertqa.windows import INPUT_NAMES, OUTPUT_NAMES
from engine_builder.architectures import build_graph, read_architecture
from engine_builder.build import BuildOptions, build, calibration_windows, window_tokenizer
from engine_builder.checkpoint import read_weights
from engine_builder.engine import EngineOptions, Source, full_windows
from engine_builder.publish import BuildRefused
from engine_builder.quantization import LARGEST, QuantizedType, calibrate
from engine_builder.targets import tensorrt
from engine_builder.targets.tensorrt import TensorRT
from tests.support.checkpoints import write_checkpoint
from tests.support.onnx_graphs import run
from tests.support.paths import ROOT
from tests.support.squad_files import write_squad

TYPES = Path(sys.prefix) / "tensorrt-types"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    directory = tmp_path_factory.mktemp("source")
    checkpoint = write_checkpoint(directory / "tiny")
    architecture = read_architecture(checkpoint)
    weights = read_weights(checkpoint, architecture)
    tokenizer = window_tokenizer(checkpoint, Settings.of_checkpoint(checkpoint), architecture)
    reference = directory / "float32.onnx"
    onnx.save(build_graph(architecture, weights), reference)
    examples = read_squad(write_squad(directory / "squad.json"))
    calibration = calibration_windows(examples, tokenizer)
    for length in tokenizer.buckets:
        calibration += full_windows(examples, tokenizer, length)
    return Source(
        architecture=architecture,
        weights=weights,
        reference=reference,
        buckets=tokenizer.buckets,
        calibration=calibration,
    )


@pytest.mark.parametrize("precision", tensorrt.PRECISIONS)
def test_graph_is_one_that_both_versions_read_and_answers_like_float32(
    source: Source, precision: tensorrt.Precision
) -> None:
    model = tensorrt.typed_graph(source, precision)
    assert all(node.domain == "" for node in model.graph.node), "no plugins"
    assert [entry.version for entry in model.opset_import] in ([17], [19])  # TensorRT 10.0 reads up to 20
    types = {
        each.name: each.type.tensor_type.elem_type for each in onnx.shape_inference.infer_shapes(model).graph.value_info
    }
    half = onnx.TensorProto.BFLOAT16 if precision == "bf16" else onnx.TensorProto.FLOAT16
    for node in model.graph.node:
        if node.op_type in ("LayerNormalization", "Softmax"):
            assert types[node.input[0]] == onnx.TensorProto.FLOAT
        if node.op_type == "MatMul":
            assert types[node.output[0]] == half
    (window,) = source.calibration[:1]
    exact = np.array(run(onnx.load(source.reference), window.tensors()))
    if precision == "bf16":  # ONNX Runtime has no bfloat16 on a CPU
        found = np.array([*ReferenceEvaluator(model).run(list(OUTPUT_NAMES), window.tensors())])
    else:
        found = np.array(run(model, window.tensors()))
    error = np.sqrt(np.mean(np.square(found - exact))) / exact.std()
    assert error < {"fp16": 0.01, "bf16": 0.05, "int8": 0.2, "fp8": 0.2}[precision]


@pytest.mark.parametrize("kind", LARGEST)
def test_every_linear_layer_of_the_encoder_is_quantized_within_its_range(source: Source, kind: QuantizedType) -> None:
    quantization = calibrate(source.reference, source.weights, source.calibration, kind)
    layers = source.architecture.encoder.layers
    assert len(quantization.layers) == 6 * layers
    for name, scales in quantization.layers.items():
        weight = source.weights[f"{name}.weight"]
        assert (scales.smoothing is not None) == (kind == "int8")
        smoothed = weight if scales.smoothing is None else weight * scales.smoothing
        largest = np.abs(smoothed).max(axis=1) if scales.weight.ndim else np.abs(smoothed).max()
        np.testing.assert_allclose(scales.weight, largest / LARGEST[kind], rtol=1e-5)
        assert scales.input > 0
    shared = [quantization.layers[f"encoder.layer.0.attention.self.{part}"] for part in ("query", "key", "value")]
    assert len({each.input for each in shared}) == 1  # they read the same tensor
    operators = [node.op_type for node in tensorrt.typed_graph(source, kind).graph.node]
    # an input for queries, keys and values together and for each of the others; a weight for every layer
    assert operators.count("QuantizeLinear") == operators.count("DequantizeLinear") == (4 + 6) * layers


def test_calibration_needs_a_window(source: Source) -> None:
    with pytest.raises(ValueError, match="at least one"):
        calibrate(source.reference, source.weights, [], "int8")


def test_there_are_types_of_both_major_versions() -> None:
    assert sorted(path.name.partition(".")[0] for path in TYPES.iterdir()) == ["10", "11"]


@pytest.mark.slow
@pytest.mark.parametrize("version", sorted(path.name for path in TYPES.glob("*")) or ["missing"])
def test_a_whole_build_on_the_types_of_tensorrt(tmp_path: Path, version: str) -> None:
    checkpoint = write_checkpoint(tmp_path / "tiny")
    for name in ("gate.json", "calibration.json"):
        write_squad(checkpoint / name)
    cache = tmp_path / "timing.cache"
    cache.write_bytes(b"before")
    options = {
        "checkpoint": str(checkpoint),
        "repository": str(tmp_path / "repository"),
        "max_batch_size": 4,
        "optimization_level": 5,
        "timing_cache": str(cache),
        "version_compatible": True,
        "hardware_compatible": True,
    }
    precisions = ["fp16", "int8", "fp8"]  # ONNX Runtime has no bfloat16 on a CPU
    types = str(TYPES / version)
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "support" / "tensorrt_calls.py"), json.dumps(options), *precisions],
        env={**os.environ, "LD_LIBRARY_PATH": types, "PYTHONPATH": os.pathsep.join([types, str(ROOT)])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for precision, told in zip(precisions, lines, strict=True):
        begun = "before" if precision == "fp16" else "after"
        manifest = told.pop("manifest")
        assert told == {
            "parsed": ["typed.onnx"],
            "strongly_typed_alone": True,
            "flags": ["VERSION_COMPATIBLE"],  # and none of a precision
            "profiles": [{name: [[1, n], [4, n], [4, n]] for name in INPUT_NAMES} for n in (64, 128)],
            "added": 2,
            "level": 5,
            "hardware": "AMPERE_PLUS",
            "timing_caches": [begun, begun],  # to begin with, and to be joined with what was learnt
            "used": [0, 1],  # a context for each profile
            "captures": [["thread_local"]] * 2,
            "launches": 2 * (1 + 9),
        }
        repository = Repository(tmp_path / "repository")
        bundle = repository.open(precision)
        assert json.loads(json.dumps(asdict(bundle.manifest))) == manifest
        assert changed_files(repository.directory(precision, 1), bundle.manifest) == []
        runtime = {"tensorrt": version, "cuda": "13.3", "driver": "580.65.6", "compute_capability": "9.0"}
        assert runtime.items() <= manifest["runtime"].items()
        times = {"p50", "p90", "p99", "graph_p50", "graph_p90", "graph_p99"}
        assert {length: found.keys() for length, found in manifest["latency_ms"].items()} == {"64": times, "128": times}
    assert cache.read_bytes() == b"after"


def test_a_cuda_runtime_that_is_missing_or_too_new_is_told_before_anything_is_built(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cuda.core
    import polygraphy.cuda

    def missing() -> None:
        raise OSError("libcudart.so: cannot open shared object file")

    def newer() -> SimpleNamespace:
        def version(reference: Any) -> None:
            reference._obj.value = 13030

        return SimpleNamespace(handle=SimpleNamespace(cudaRuntimeGetVersion=version))

    monkeypatch.setenv("LD_LIBRARY_PATH", "")
    monkeypatch.setattr(cuda.core.system, "get_user_mode_driver_version", lambda: (12, 9))
    for wrapper, words in (
        (missing, r"needs the CUDA runtime: libcudart.*; pip install"),
        (newer, r"the driver supports CUDA up to 12\.9, but the CUDA runtime is 13\.3; install a newer driver"),
    ):
        monkeypatch.setattr(polygraphy.cuda, "wrapper", wrapper)
        with ExitStack() as stack, pytest.raises(BuildRefused, match=words):
            TensorRT().build(source, tmp_path, "fp16", EngineOptions(), stack)


def test_names_of_cuda_are_there() -> None:
    from cuda.core import Device, EventOptions, Stream, system
    from cuda.core.graph import Graph, GraphBuilder

    EventOptions(timing_enabled=True)
    for owner, names in (
        (Device, ["set_current", "compute_capability", "name"]),
        (Stream, ["from_handle", "record", "create_graph_builder"]),
        (GraphBuilder, ["begin_building", "end_building", "complete"]),
        (Graph, ["launch"]),
        (system, ["get_user_mode_driver_version", "get_kernel_mode_driver_version"]),
    ):
        assert [name for name in names if not hasattr(owner, name)] == []


def test_a_machine_without_gpu_is_told_what_is_missing_and_what_works(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "tiny")
    write_squad(checkpoint / "gate.json")
    done = subprocess.run(
        [sys.executable, "-m", "engine_builder", f"--checkpoint={checkpoint}", "--target=tensorrt"],
        cwd=tmp_path,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    first, *parts, last = done.stderr.strip().splitlines()
    assert first == "bertqa: error: --target tensorrt: this machine lacks:"
    assert all(part.startswith("  - ") for part in parts)
    assert any(part.startswith("  - a GPU: ") for part in parts)
    assert last == "--target cpu works here"
    assert not (tmp_path / "model_repository").exists()


@pytest.mark.parametrize(
    ("capability", "precision", "words"),
    [
        ((7, 5), "bf16", "has compute capability 7.5, and 8.0 is needed; fp16 and int8 would work"),
        ((8, 6), "fp8", "has compute capability 8.6, and 8.9 is needed; fp16 and int8 and bf16 would work"),
        ((6, 1), "fp16", "and 7.5 is needed; nothing would work"),
        ((9, 0), "fp8", ""),
    ],
)
def test_a_precision_that_the_gpu_has_not_is_refused(
    monkeypatch: pytest.MonkeyPatch, capability: Sequence[int], precision: tensorrt.Precision, words: str
) -> None:
    import cuda.core

    class Device:
        name = "Some GPU"

        class compute_capability:
            major, minor = capability

    monkeypatch.setattr(tensorrt, "missing_parts", dict)
    monkeypatch.setattr(cuda.core, "Device", Device)
    if words:
        with pytest.raises(BuildRefused, match=f"--precision {precision}: Some GPU .*{words}"):
            TensorRT().check_machine(precision, EngineOptions())
    else:
        TensorRT().check_machine(precision, EngineOptions())
    if capability == (7, 5):
        with pytest.raises(BuildRefused, match=r"--hardware-compatible: Some GPU has .* 7\.5, .* from 8\.0 on"):
            TensorRT().check_machine("fp16", EngineOptions(hardware_compatible=True))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", tensorrt.PRECISIONS)
def test_engine_on_a_gpu_passes_its_gates(tmp_path: Path, precision: tensorrt.Precision) -> None:
    refusal = ""
    try:
        TensorRT().check_machine(precision, EngineOptions())
    except BuildRefused as error:
        refusal = str(error)
    if refusal:
        assert "compute capability" in refusal  # this GPU cannot, and the builder says so
        return
    options = BuildOptions(
        checkpoint=str(ROOT / "checkpoints" / "minilm-l6-squad"),
        target="tensorrt",
        precision=precision,
        repository=tmp_path,
        max_batch_size=4,
        timing_cache=tmp_path / "timing.cache",
    )
    manifest = build(options)
    assert manifest.reference_f1 - manifest.f1 <= 0.5
    assert manifest.max_batch_size == 4
    assert {"tensorrt", "cuda", "driver", "gpu", "compute_capability"} <= manifest.runtime.keys()
    assert [*manifest.latency_ms] == [str(length) for length in manifest.buckets]
    assert all(time > 0 for each in manifest.latency_ms.values() for time in each.values())
    assert options.timing_cache is not None
    assert options.timing_cache.stat().st_size > 0


@pytest.mark.gpu
def test_engine_on_a_gpu_answers_every_bucket_by_its_own_profile(source: Source, tmp_path: Path) -> None:
    with ExitStack() as stack:
        bundle = tmp_path / "bundle"
        bundle.mkdir()
        engine = TensorRT().build(source, bundle, "fp16", EngineOptions(), stack)
        assert {window.length for window in source.calibration} == {*source.buckets}
        for window in source.calibration:
            exact = run(onnx.load(source.reference), window.tensors())
            np.testing.assert_allclose(engine.predict(window), exact, atol=0.05)
