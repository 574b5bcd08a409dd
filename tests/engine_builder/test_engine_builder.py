"""Test the whole build of a tiny checkpoint: measured, gated, published, and described as the service expects."""

import asyncio
import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import onnx
import openvino as ov
import pytest
from google.protobuf import text_format
from safetensors.numpy import load_file, save_file
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

from bertqa.manifest import Bundle, Manifest, sha256_of
from bertqa.repository import Repository
from bertqa.spans import Logits
from bertqa.squad import Score, read_squad
from bertqa.triton_config import Serving, model_config, parse, to_text
from bertqa.windows import INPUT_NAMES, OUTPUT_NAMES, Window
from engine_builder import checkpoint as checkpoints
from engine_builder.architectures import build_graph, read_architecture
from engine_builder.build import BuildOptions, build
from engine_builder.checkpoint import InvalidCheckpoint, read_weights
from engine_builder.gate import AccuracyGate, GateFailed, Measured, measure
from engine_builder.publish import BuildRefused, Publication, publish
from engine_builder.targets import openvino
from engine_builder.targets.openvino_model import Engine, engine_sha256
from service.runtime.triton_process import FLAGS, EmbeddedTriton
from service.triton.channels import Channels
from tests.support.checkpoints import write_checkpoint
from tests.support.paths import ROOT
from tests.support.ports import triton_ports
from tests.support.squad_files import CONTEXT, QUESTIONS, write_squad
from tests.support.triton_servers import triton_with

ANY_LOSS = ["--max-f1-loss", "100", "--max-logit-error", "10"]  # where it is not the engine that is tested


@pytest.fixture
def options(tmp_path: Path) -> BuildOptions:
    checkpoint = write_checkpoint(tmp_path / "tiny")
    write_squad(checkpoint / "gate.json")
    write_squad(checkpoint / "calibration.json")
    return BuildOptions(
        checkpoint=str(checkpoint), target="cpu", precision="fp32", repository=tmp_path / "repository", threads=1
    )


def files(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def test_a_build_is_a_bundle_that_the_service_opens(options: BuildOptions) -> None:
    manifest = build(options)
    bundle = Repository(options.repository).open()
    assert bundle.version == 1
    assert bundle.manifest == manifest
    assert (manifest.name, manifest.target, manifest.precision) == ("tiny", "cpu", "fp32")
    assert (manifest.max_seq_len, manifest.overlap, manifest.max_question_tokens) == (128, 16, 16)
    assert manifest.buckets == (64, 128)  # no longer than a window
    assert manifest.checkpoint_sha256 == sha256_of(Path(options.checkpoint) / "model.safetensors")
    assert manifest.f1 == manifest.reference_f1  # float32 answers like float32
    assert manifest.gate_questions == len(QUESTIONS)
    assert list(manifest.latency_ms) == ["64", "128"]
    for times in manifest.latency_ms.values():
        assert 0 < times["p50"] <= times["p90"] <= times["p99"]
    version = options.repository / "bert_qa" / "1"
    assert files(version) == [
        "__pycache__",
        "engine.bin",
        "engine.xml",
        "manifest.json",
        "model.py",
        "questions.json",
        "tokenizer.json",
    ]
    assert manifest.engine_sha256 == engine_sha256(version / "engine.xml")
    assert files(options.repository / "bert_qa")[-1] == "config.pbtxt"


@pytest.mark.parametrize("precision", openvino.PRECISIONS)
def test_every_precision_answers(options: BuildOptions, precision: openvino.Precision) -> None:
    manifest = build(replace(options, precision=precision, max_f1_loss=100))
    assert manifest.precision == openvino.supported_precision(precision)
    bundle = Repository(options.repository).open()
    engine = Engine(
        options.repository / "bert_qa" / "1" / manifest.engine_file,
        precision=manifest.precision,
        buckets=manifest.buckets,
        threads=1,
    )
    assert engine.output_names == list(OUTPUT_NAMES)
    (window,) = bundle.tokenizer("Who wrote it?", CONTEXT).windows
    first = engine.infer(window.tensors())
    kept = [array.copy() for array in first]
    engine.infer({name: np.zeros((1, 64), np.int32) for name in INPUT_NAMES})
    for array, copy in zip(first, kept, strict=True):
        assert array.shape == (1, 64)
        assert array.dtype == np.float32
        assert np.isfinite(array).all()
        np.testing.assert_array_equal(array, copy)  # the next call leaves it alone
    with pytest.raises(ValueError, match=r"length 65 is not one of the engine's buckets \[64, 128\]"):
        engine.infer({name: np.zeros((1, 65), np.int32) for name in INPUT_NAMES})


def test_without_bf16_instructions_fp32_is_built_and_recorded(
    options: BuildOptions, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    get_property = ov.Core.get_property

    def without_bf16(core: ov.Core, *names: str) -> object:
        value = get_property(core, *names)
        return [kind for kind in value if kind != "BF16"] if names[-1] == "OPTIMIZATION_CAPABILITIES" else value

    monkeypatch.setattr(ov.Core, "get_property", without_bf16)
    assert build(replace(options, precision="bf16")).precision == "fp32"
    assert "this CPU has no bf16; building fp32 instead" in capsys.readouterr().err
    engine = options.repository / "bert_qa" / "1" / "engine.xml"
    assert Engine(engine, precision="bf16", buckets=[64], threads=1).float_type == "f32"


@pytest.mark.parametrize(
    ("precision", "fast", "slow"), [("int8", "", "fp32 is faster"), ("bf16", "int8 is faster", "")]
)
def test_what_is_faster_depends_on_the_int8_instructions(
    options: BuildOptions,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    precision: openvino.Precision,
    fast: str,
    slow: str,
) -> None:
    monkeypatch.setattr(openvino, "supported_precision", {"int8": "int8", "bf16": "fp32"}.get)
    for features, said in ((("avx2", "avx_vnni"), fast), (("avx2",), slow)):
        monkeypatch.setattr(openvino, "cpu_features", lambda features=features: features)
        with pytest.raises(BuildRefused, match="--gate-data"):  # comes after what is said
            build(replace(options, precision=precision, gate_data=Path("nowhere")))
        told = capsys.readouterr().err
        assert said in told
        assert ("faster" in told) == bool(said)


@pytest.mark.parametrize(
    ("features", "precision"),
    [
        (("avx512f", "avx512_bf16", "amx_bf16", "avx512_vnni", "amx_int8"), "bf16"),
        (("avx512f", "avx512_bf16", "avx512_vnni"), "int8"),
        (("avx2", "avx_vnni"), "int8"),
        (("avx2",), "fp32"),
        ((), "fp32"),
    ],
)
def test_default_precision_follows_the_instructions(
    monkeypatch: pytest.MonkeyPatch, features: tuple[str, ...], precision: str
) -> None:
    # The choice alone: an engine built for instructions that this CPU lacks would answer something else.
    monkeypatch.setattr(openvino, "cpu_features", lambda: features)
    assert openvino.OpenVINO().default_precision() == precision


def test_without_a_precision_the_default_of_this_cpu_is_built(options: BuildOptions) -> None:
    manifest = build(replace(options, precision=None, max_f1_loss=100))
    assert manifest.precision == openvino.OpenVINO().default_precision()


@pytest.mark.parametrize(
    ("features", "weights_have_7_bits"), [(("avx2",), True), (("avx2", "avx_vnni"), False), (("avx512_vnni",), False)]
)
def test_int8_weights_leave_a_bit_free_exactly_where_products_would_saturate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, features: tuple[str, ...], weights_have_7_bits: bool
) -> None:
    import nncf

    checkpoint = write_checkpoint(tmp_path)
    architecture = read_architecture(checkpoint)
    onnx.save(build_graph(architecture, read_weights(checkpoint, architecture)), tmp_path / "model.onnx")
    told: list[Any] = []

    def quantize(model: ov.Model, *_: object, **options: Any) -> ov.Model:
        told.append(options["advanced_parameters"].overflow_fix)
        return model

    monkeypatch.setattr(openvino, "cpu_features", lambda: features)
    monkeypatch.setattr(nncf, "quantize", quantize)
    openvino.convert(tmp_path / "model.onnx", tmp_path / "engine.xml", "int8", [])
    assert told == [nncf.OverflowFix.ENABLE if weights_have_7_bits else nncf.OverflowFix.DISABLE]


def test_default_without_calibration_data_is_fp32(
    options: BuildOptions, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(openvino, "cpu_features", lambda: ("avx512_vnni",))
    (Path(options.checkpoint) / "calibration.json").unlink()
    assert build(replace(options, precision=None)).precision == "fp32"
    assert "no calibration.json; building fp32 (int8 with --calibration-data is faster)" in capsys.readouterr().err


def test_bf16_without_amx_is_built_and_told(
    options: BuildOptions, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(openvino, "supported_precision", lambda wanted: wanted)
    for features, told in ((("avx512_bf16", "avx512_vnni"), True), (("avx512_bf16", "amx_bf16"), False)):
        monkeypatch.setattr(openvino, "cpu_features", lambda features=features: features)
        with pytest.raises(BuildRefused, match="--gate-data"):  # comes after what is said
            build(replace(options, precision="bf16", gate_data=Path("nowhere")))
        assert ("without AMX; --precision int8 is faster" in capsys.readouterr().err) == told


def test_versions_count_up_and_the_previous_one_stays(options: BuildOptions) -> None:
    for _ in range(3):
        build(options)
    model = options.repository / "bert_qa"
    assert sorted(path.name for path in model.iterdir()) == ["1", "3", "config.pbtxt"]  # the active one, the latest
    assert Repository(options.repository).open().version == 1
    build(replace(options, version=7, activate=True))
    assert Repository(options.repository).open().version == 7
    assert sorted(path.name for path in model.iterdir()) == ["1", "7", "config.pbtxt"]
    with pytest.raises(BuildRefused, match=r"--version 7: .* already has version 7"):
        build(replace(options, version=7))


def test_a_bundle_of_an_earlier_release_gives_way(options: BuildOptions) -> None:
    build(options)
    manifest = options.repository / "bert_qa" / "1" / "manifest.json"
    manifest.write_text('{"format": 1, "name": "tiny"}')
    build(options)
    bundle = Repository(options.repository).open()
    assert bundle.version == 2
    config = text_format.Parse((manifest.parents[1] / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    assert list(config.version_policy.specific.versions) == [2]


def test_several_models_and_their_serving_options(options: BuildOptions) -> None:
    build(replace(options, instances=3))
    build(replace(options, model="korean", activate=True))
    build(replace(options, threads=None))  # neither flag: as they were
    serving = Repository(options.repository).serving()
    assert {name: (each.active, each.instances, each.threads) for name, each in serving.items()} == {
        "bert_qa": (1, 3, 1),
        "korean": (1, 2, 1),
    }
    with pytest.raises(BuildRefused, match=r"--model \.\./x: use letters, digits"):
        build(replace(options, model="../x"))


def test_a_refused_build_leaves_no_trace(options: BuildOptions) -> None:
    with pytest.raises(GateFailed, match="--max-f1-loss"):
        build(replace(options, max_f1_loss=-1))
    assert not options.repository.exists()
    build(options)
    before = {path: path.read_bytes() for path in options.repository.rglob("*") if path.is_file()}
    with pytest.raises(GateFailed, match=r"; try --precision fp32 or bf16$"):
        build(replace(options, precision="int8", max_f1_loss=-1))
    assert before == {path: path.read_bytes() for path in options.repository.rglob("*") if path.is_file()}


def test_the_gate_names_both_numbers() -> None:
    measured = Measured(
        Score(70, 80.25, 500), Score(71, 81.0, 500), same_spans=0.9, max_logit_error=1.0, logit_error=0.05
    )
    AccuracyGate(max_f1_loss=0.75, max_logit_error=0.05).check(measured)
    strict = AccuracyGate(max_f1_loss=0.5, max_logit_error=1)
    with pytest.raises(GateFailed, match=r"F1 80\.25 .* 0\.75 below the 81\.00 .* at most 0\.5 .*--max-f1-loss\)$"):
        strict.check(measured)
    with pytest.raises(GateFailed, match=r"; try --precision fp32 or bf16$"):
        strict.check(measured, ["fp32", "bf16"])
    with pytest.raises(GateFailed, match=r"differ .* by 5\.0% .* at most 4\.0% .*--max-logit-error"):
        AccuracyGate(max_f1_loss=1, max_logit_error=0.04).check(measured)


def test_logits_that_are_not_finite_are_refused(options: BuildOptions) -> None:
    file = Path(options.checkpoint) / "model.safetensors"
    weights = load_file(file)
    weights["qa_outputs.weight"] = np.full((2, 32), 6e38, np.float64)  # finite as stored, infinite as float32
    save_file(weights, file)
    with (
        np.errstate(over="ignore"),
        pytest.raises(InvalidCheckpoint, match=r"qa_outputs\.weight contains NaN or infinite"),
    ):
        build(options)
    weights["qa_outputs.weight"] = np.full((2, 32), 3e38, np.float32)
    save_file(weights, file)
    with pytest.raises(GateFailed, match="float32 reference: unusable logits"):
        build(options)
    assert not options.repository.exists()


def test_an_engine_that_overflows_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    def finite(window: Window) -> Logits:
        return np.zeros(window.input_ids.shape, np.float32), np.zeros(window.input_ids.shape, np.float32)

    def infinite(window: Window) -> Logits:
        return np.full(window.input_ids.shape, np.inf, np.float32), finite(window)[1]

    examples = read_squad(write_squad(tmp_path / "squad.json"))
    assert measure(examples, bundle.tokenizer, finite, finite).logit_error == 0
    with pytest.raises(GateFailed, match=r"^engine: unusable logits, .*so try --precision bf16$"):
        measure(examples, bundle.tokenizer, infinite, finite)


def test_a_tokenizer_of_another_language_is_refused(options: BuildOptions) -> None:
    write_checkpoint(Path(options.checkpoint), text="un deux trois quatre")
    with pytest.raises(GateFailed, match=r"tokenizer\.json: .*% of the tokens .* \[UNK\]"):
        build(options)


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("config.json", {"vocab_size": 8}, r"tokenizer\.json: has \d+ tokens, but vocab_size in config\.json is 8"),
        ("bertqa.json", {"max_seq_len": 256}, "max_seq_len of bertqa.json is 256, but max_position_embeddings"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(
    options: BuildOptions, file: str, fields: dict[str, int], message: str
) -> None:
    path = Path(options.checkpoint) / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(InvalidCheckpoint, match=message):
        build(options)


@pytest.mark.parametrize(("name", "flag"), [("gate", "--gate-data"), ("calibration", "--calibration-data")])
def test_missing_questions_name_their_flag(options: BuildOptions, name: str, flag: str) -> None:
    (Path(options.checkpoint) / f"{name}.json").unlink()
    with pytest.raises(BuildRefused, match=f"{flag}: required, because the checkpoint has no {name}.json"):
        build(replace(options, precision="int8"))


def test_config_says_what_windows_send(options: BuildOptions) -> None:
    manifest = build(options)
    text = (options.repository / "bert_qa" / "config.pbtxt").read_text()
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    assert (config.name, config.backend, config.max_batch_size) == ("bert_qa", "python", 1)
    for tensors, names, data_type in (
        (config.input, INPUT_NAMES, model_config_pb2.TYPE_INT32),
        (config.output, OUTPUT_NAMES, model_config_pb2.TYPE_FP32),
    ):
        assert [(tensor.name, tensor.data_type, list(tensor.dims)) for tensor in tensors] == [
            (name, data_type, [-1]) for name in names
        ]
    (group,) = config.instance_group
    assert (group.kind, group.count) == (model_config_pb2.ModelInstanceGroup.KIND_CPU, 2)
    policy = config.dynamic_batching.default_queue_policy
    assert policy.timeout_action == model_config_pb2.ModelQueuePolicy.REJECT
    assert policy.max_queue_size == 256
    assert policy.default_timeout_microseconds > 0
    assert policy.allow_timeout_override
    assert list(config.version_policy.specific.versions) == [1]
    assert config.parameters["identity_1"].string_value == manifest.identity
    assert config.parameters["threads"].string_value == "1"
    warmed = [[list(warmup.inputs[name].dims) for name in INPUT_NAMES] for warmup in config.model_warmup]
    assert warmed == [[[length]] * 3 for length in manifest.buckets]


@pytest.mark.triton
def test_windows_of_one_length_are_computed_together(options: BuildOptions, tmp_path: Path) -> None:
    build(replace(options, max_batch_size=4, instances=2))
    bundle = Repository(options.repository).open()
    texts = [" ".join([CONTEXT] * repeats) for repeats in range(1, 9)]
    windows = [
        bundle.tokenizer("Who wrote it?", text, max_seq_len=n).windows[0] for text in texts for n in (64, 128)
    ] * 6
    assert {window.length for window in windows} == {64, 128}
    alone = openvino.load(options.repository / "bert_qa" / "1" / "engine.xml", "fp32", (64, 128), 1)

    async def ask(url: str) -> tuple[list[Logits], Any]:
        channels = Channels([url])
        channel = grpc.aio.insecure_channel(url)
        try:
            await channels.admin().loaded(deadline=time.monotonic() + 30)
            logits = await channels.engine().predict(windows, deadline=time.monotonic() + 30)
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            statistics = await stub.ModelStatistics(service_pb2.ModelStatisticsRequest(name="bert_qa"))
            return logits, statistics.model_stats[0]
        finally:
            await channels.close()
            await channel.close()

    with EmbeddedTriton(options.repository, ports=triton_ports(), log_dir=tmp_path / "logs") as triton:
        logits, statistics = asyncio.run(ask(triton.url))
    for window, found in zip(windows, logits, strict=True):
        for own, together in zip(alone(window), found, strict=True):
            np.testing.assert_allclose(together, own, atol=1e-4)
    warm_ups = 2 * 2 * 2  # instances, lengths, of one window and of four
    assert statistics.inference_count == len(windows) + warm_ups // 2 * (1 + 4)
    assert statistics.execution_count < len(windows) + warm_ups


def test_a_single_instance_has_no_queue_policy(options: BuildOptions) -> None:
    config = model_config("bert_qa", {1: build(options)}, Serving(active=1, loaded=(1,), instances=1))
    assert config.instance_group[0].count == 1
    assert config.HasField("dynamic_batching")
    assert not config.dynamic_batching.HasField("default_queue_policy")


def test_config_of_a_name_with_quotes(options: BuildOptions) -> None:
    manifest = replace(build(options), name='ünïcode "quoted" \\')
    config = parse(to_text(model_config("bert_qa", {1: manifest}, Serving(active=1, loaded=(1,)))))
    assert config.parameters["identity_1"].string_value == manifest.identity


def test_hub_checkpoints_need_the_hub_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InvalidCheckpoint, match="pip install huggingface_hub"):
        checkpoints.find_checkpoint("owner/name")


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "engine_builder", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_command_line(options: BuildOptions) -> None:
    arguments = ["--checkpoint", options.checkpoint, "--repository", str(options.repository)]
    done = command(*arguments, "--target", "cpu", "--precision", "fp32")
    assert done.returncode == 0, done.stderr
    manifest = Manifest.read(options.repository / "bert_qa" / "1" / "manifest.json")
    assert manifest.identity in done.stderr
    assert "'--instances': must be at least 1" in command(*arguments, "--target", "cpu", "--instances", "0").stderr


def test_the_builder_needs_neither_torch_nor_transformers(options: BuildOptions) -> None:
    code = (
        "import runpy, sys; sys.modules.update(torch=None, transformers=None); "
        "runpy.run_module('engine_builder', run_name='__main__', alter_sys=True)"
    )
    arguments = ["--checkpoint", options.checkpoint, "--repository", str(options.repository)]
    arguments += ["--target", "cpu", "--precision", "int8", *ANY_LOSS]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert Repository(options.repository).open().manifest.precision == "int8"


@pytest.mark.slow
def test_nobody_is_told_of_a_build_or_of_an_engine_that_starts(
    options: BuildOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # OpenVINO and NNCF report to their makers, unless CI is set, and keep an identity of the machine in ~/intel.
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for name in ("CI", "TF_BUILD", "JENKINS_URL", "NNCF_CI", "NNCF_DEV"):
        monkeypatch.delenv(name, raising=False)
    arguments = ["--checkpoint", options.checkpoint, "--repository", str(options.repository), "--target", "cpu"]
    done = command(*arguments, "--precision", "int8", *ANY_LOSS)
    assert done.returncode == 0, done.stderr
    assert not (home / "intel").exists()
    engine = options.repository / "bert_qa" / "1" / "model.py"  # which Triton runs without this project
    subprocess.run([sys.executable, str(engine)], cwd=tmp_path, check=True, timeout=60)
    assert not (home / "intel").exists()


def test_instances_and_gpus_reach_the_configuration(bundle: Bundle, tmp_path: Path) -> None:
    built = tmp_path / "built"
    built.mkdir()
    where = Publication(repository=tmp_path / "repository", instances=3, gpus=(0, 2))
    publish(built, replace(bundle.manifest, target="tensorrt"), where)
    config = parse((where.repository / "bert_qa" / "config.pbtxt").read_text())
    (group,) = config.instance_group
    assert (group.count, list(group.gpus)) == (3, [0, 2])
    assert group.kind == model_config_pb2.ModelInstanceGroup.KIND_GPU
    assert list(group.profile) == ["0", "1"]  # one for each bucket; unnamed, Triton would use the first alone
    assert config.backend == "tensorrt"
    assert config.optimization.cuda.graphs
    assert not config.optimization.cuda.graph_spec


@pytest.mark.triton
def test_triton_takes_the_configuration_of_a_gpu_and_lacks_but_the_backend(bundle: Bundle, tmp_path: Path) -> None:
    built = tmp_path / "built"
    built.mkdir()
    (built / "model.plan").write_bytes(b"a plan")
    where = Publication(repository=tmp_path / "repository")
    publish(built, replace(bundle.manifest, target="tensorrt", engine_file="model.plan"), where)
    with triton_with(tmp_path, where.repository, *FLAGS, "--log-verbose=1"):
        pass
    log = (tmp_path / "log").read_text()
    for line in ('platform: "tensorrt_plan"', 'default_model_filename: "model.plan"', 'profile: "1"'):
        assert line in log
    failures = set(re.findall(r"failed to load 'bert_qa' version 1: (.*?)[,\"]", log))
    assert failures == {"Invalid argument: unable to find backend library for backend 'tensorrt'"}
