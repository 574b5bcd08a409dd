"""Test the graphs against transformers, and the refusal of invalid checkpoints."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import (
    AutoModelForQuestionAnswering,
    BertConfig,
    BertForQuestionAnswering,
    DistilBertConfig,
    DistilBertForQuestionAnswering,
    ElectraConfig,
    ElectraForQuestionAnswering,
    PretrainedConfig,
    PreTrainedModel,
)

from bertqa.repository import Repository
from bertqa.windows import INPUT_NAMES, Window
from engine_builder.architectures import FAMILIES, Architecture, build_graph, read_architecture
from engine_builder.architectures.bert import Bert
from engine_builder.architectures.graph import FloatType
from engine_builder.build import BuildOptions, build
from engine_builder.checkpoint import InvalidCheckpoint, find_checkpoint, read_weights
from engine_builder.engine import Source
from engine_builder.targets import tensorrt
from tests.support.checkpoints import write_checkpoint
from tests.support.onnx_graphs import run
from tests.support.squad_files import write_squad


def graph_of(checkpoint: Path, float_type: FloatType = "float32") -> onnx.ModelProto:
    architecture = read_architecture(checkpoint)
    return build_graph(architecture, read_weights(checkpoint, architecture), float_type)


def tensors(length: int, padding: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(length)
    ids = random.integers(0, 64, (1, length), dtype=np.int32)
    mask = np.ones((1, length), dtype=np.int32)
    mask[0, length - padding :] = 0
    types = (np.arange(length, dtype=np.int32) > length // 3).astype(np.int32)[None]
    return dict(zip(INPUT_NAMES, (ids, mask, types), strict=True))


@pytest.mark.parametrize(("length", "padding"), [(1, 0), (7, 0), (64, 30), (128, 1)])
def test_logits_equal_those_of_transformers(tmp_path: Path, length: int, padding: int) -> None:
    checkpoint = write_checkpoint(tmp_path)
    reference = BertForQuestionAnswering.from_pretrained(checkpoint, dtype=torch.float32)
    reference.train(mode=False)
    inputs = tensors(length, padding)
    with torch.no_grad():
        expected = reference(**{name: torch.from_numpy(array).long() for name, array in inputs.items()})
    start, end = run(graph_of(checkpoint), inputs)
    assert start.dtype == end.dtype == np.float32
    np.testing.assert_allclose(start, expected.start_logits.numpy(), atol=1e-4)
    np.testing.assert_allclose(end, expected.end_logits.numpy(), atol=1e-4)


SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}
DISTILBERT: dict[str, Any] = {
    "vocab_size": 64,
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 64,
    "max_position_embeddings": 128,
}


def random_checkpoint(
    directory: Path, family: type[PreTrainedModel], config: PretrainedConfig, *, width: float = 0.2
) -> Path:
    """Write a checkpoint with random weights as transformers saves it; every parameter matters to the logits."""
    torch.manual_seed(0)
    model = family(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_("norm.weight" in name.lower(), width)
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("family", "config"),
    [
        (ElectraForQuestionAnswering, ElectraConfig(**SIZES, embedding_size=16)),
        (ElectraForQuestionAnswering, ElectraConfig(**SIZES, embedding_size=32)),
        (DistilBertForQuestionAnswering, DistilBertConfig(**DISTILBERT)),
        (DistilBertForQuestionAnswering, DistilBertConfig(**DISTILBERT, sinusoidal_pos_embds=True)),
    ],
    ids=["electra", "electra without a projection", "distilbert", "distilbert with sinusoids"],
)
@pytest.mark.parametrize(("length", "padding"), [(1, 0), (64, 30), (128, 1)])
def test_other_families_give_the_logits_of_transformers(
    tmp_path: Path, family: type[PreTrainedModel], config: PretrainedConfig, length: int, padding: int
) -> None:
    checkpoint = random_checkpoint(tmp_path, family, config)
    reference = AutoModelForQuestionAnswering.from_pretrained(checkpoint, dtype=torch.float32)
    reference.train(mode=False)
    inputs = tensors(length, padding)
    taken = [name for name in INPUT_NAMES if name != "token_type_ids" or config.model_type != "distilbert"]
    with torch.no_grad():
        expected = reference(**{name: torch.from_numpy(inputs[name]).long() for name in taken})
    start, end = run(graph_of(checkpoint), inputs)
    assert np.ptp(start) > 0.1 or length == 1, "the weights make a difference"
    np.testing.assert_allclose(start, expected.start_logits.numpy(), atol=1e-4)
    np.testing.assert_allclose(end, expected.end_logits.numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("family", "config", "field", "value"),
    [
        (ElectraForQuestionAnswering, ElectraConfig(**SIZES), "architectures", ["ElectraForPreTraining"]),
        (ElectraForQuestionAnswering, ElectraConfig(**SIZES), "embedding_size", None),
        (ElectraForQuestionAnswering, ElectraConfig(**SIZES), "hidden_act", "relu"),
        (DistilBertForQuestionAnswering, DistilBertConfig(**DISTILBERT), "architectures", ["DistilBertForMaskedLM"]),
        (DistilBertForQuestionAnswering, DistilBertConfig(**DISTILBERT), "activation", "relu"),
        (DistilBertForQuestionAnswering, DistilBertConfig(**DISTILBERT), "n_heads", 5),
    ],
)
def test_what_another_family_cannot_express_is_refused(
    tmp_path: Path, family: type[PreTrainedModel], config: PretrainedConfig, field: str, value: object
) -> None:
    file = random_checkpoint(tmp_path, family, config) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(InvalidCheckpoint, match=rf"config\.json: .*{field}"):
        read_architecture(tmp_path)


OTHERS = [
    (ElectraForQuestionAnswering, ElectraConfig(**SIZES, embedding_size=16)),
    (DistilBertForQuestionAnswering, DistilBertConfig(**DISTILBERT)),
]


def window(inputs: dict[str, np.ndarray]) -> Window:
    return Window(inputs["input_ids"], inputs["attention_mask"], inputs["token_type_ids"], 1, 0, 1)


def whole_checkpoint(directory: Path, family: type[PreTrainedModel], config: PretrainedConfig) -> BuildOptions:
    """A checkpoint with tokenizer and questions, and the options to build it for this CPU."""
    checkpoint = write_checkpoint(directory / "tiny")
    random_checkpoint(checkpoint, family, config)
    for name in ("gate.json", "calibration.json"):
        write_squad(checkpoint / name)
    return BuildOptions(checkpoint=str(checkpoint), target="cpu", repository=directory / "repository", threads=1)


@pytest.mark.parametrize(("family", "config"), OTHERS, ids=["electra", "distilbert"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_other_families_build_for_this_cpu(
    tmp_path: Path, family: type[PreTrainedModel], config: PretrainedConfig, precision: str
) -> None:
    options = whole_checkpoint(tmp_path, family, config)
    manifest = build(replace(options, precision=precision, max_f1_loss=100))  # logits are close; they answer at random
    assert (manifest.precision, manifest.vocabulary_size) == (precision, 64)
    assert Repository(options.repository).open().manifest == manifest


@pytest.mark.parametrize(("family", "config"), OTHERS, ids=["electra", "distilbert"])
@pytest.mark.parametrize("precision", ["fp16", "int8", "fp8"])  # ONNX Runtime has no bfloat16 on a CPU
def test_other_families_as_graphs_for_tensorrt_answer_like_float32(
    tmp_path: Path, family: type[PreTrainedModel], config: PretrainedConfig, precision: tensorrt.Precision
) -> None:
    checkpoint = random_checkpoint(tmp_path, family, config)
    architecture = read_architecture(checkpoint)
    reference = tmp_path / "float32.onnx"
    onnx.save(graph_of(checkpoint), reference)
    inputs = [tensors(length, padding) for length, padding in ((64, 30), (128, 1))]
    source = Source(
        architecture=architecture,
        weights=read_weights(checkpoint, architecture),
        reference=reference,
        buckets=(64, 128),
        calibration=[window(each) for each in inputs],
    )
    model = tensorrt.typed_graph(source, precision)
    layers = 6 * architecture.encoder.layers
    quantized = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert len(quantized) == (0 if precision == "fp16" else layers * 10 // 6)  # 4 inputs and 6 weights a layer
    for each in inputs:
        exact, found = np.array(run(onnx.load(reference), each)), np.array(run(model, each))
        error = np.sqrt(np.mean(np.square(found - exact))) / exact.std()
        assert error < {"fp16": 0.01, "int8": 0.2, "fp8": 0.2}[precision]


def test_a_new_family_is_one_class_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Mirrored(Bert):
        """A BERT whose checkpoints store every name backwards."""

        def tensor_name(self, stored: str) -> str | None:
            return super().tensor_name(stored[::-1])

    options = whole_checkpoint(tmp_path, BertForQuestionAnswering, BertConfig(**SIZES))
    checkpoint = Path(options.checkpoint)
    weights = load_file(checkpoint / "model.safetensors")
    save_file({name[::-1]: array for name, array in weights.items()}, checkpoint / "model.safetensors")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"model_type": "mirrored"}))
    with pytest.raises(InvalidCheckpoint, match="model_type is 'mirrored'"):
        build(options)
    monkeypatch.setitem(cast(dict[str, type[Architecture]], FAMILIES), "mirrored", Mirrored)
    assert build(replace(options, precision="fp32")).name == "tiny"


def test_an_unknown_family_is_told_which_are_known(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mobilebert"}))
    with pytest.raises(InvalidCheckpoint, match=f"model_type is 'mobilebert'; supported are {', '.join(FAMILIES)}$"):
        read_architecture(tmp_path)


def test_padding_changes_nothing(tmp_path: Path) -> None:
    model = graph_of(write_checkpoint(tmp_path))
    padded = tensors(64, 24)
    bare = {name: array[:, :40] for name, array in padded.items()}
    for long, short in zip(run(model, padded), run(model, bare), strict=True):
        np.testing.assert_allclose(long[:, :40], short, atol=1e-5)


def test_nothing_but_padding_is_finite(tmp_path: Path) -> None:
    for float_type in ("float32", "float16"):
        assert np.isfinite(run(graph_of(write_checkpoint(tmp_path), float_type), tensors(8, 8))).all()


def test_half_precision_keeps_norms_and_softmax_in_float32(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path)
    exact, half = graph_of(checkpoint), graph_of(checkpoint, "float16")
    inputs = tensors(64, 10)
    np.testing.assert_allclose(run(half, inputs), run(exact, inputs), atol=0.05)
    for float_type in ("float16", "bfloat16"):
        model = onnx.shape_inference.infer_shapes(graph_of(checkpoint, float_type), strict_mode=True)
        types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
        for node in model.graph.node:
            if node.op_type in ("LayerNormalization", "Softmax"):
                assert types[node.input[0]] == onnx.TensorProto.FLOAT
            if node.op_type == "MatMul":
                assert types[node.output[0]] != onnx.TensorProto.FLOAT


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("prefix", ["bert.", ""])
def test_names_and_types_that_checkpoints_use(tmp_path: Path, prefix: str, stored: type) -> None:
    checkpoint = write_checkpoint(tmp_path, prefix=prefix)
    weights = load_file(checkpoint / "model.safetensors")
    old: dict[str, np.ndarray] = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma"): array.astype(stored) for name, array in weights.items()
    }
    old[f"{prefix}pooler.dense.weight"] = np.zeros((32, 32), np.float32)
    old[f"{prefix}embeddings.position_ids"] = np.arange(128)[None]
    save_file(old, checkpoint / "model.safetensors")
    architecture = read_architecture(checkpoint)
    read = read_weights(checkpoint, architecture)
    assert {name: array.shape for name, array in read.items()} == architecture.shapes()
    assert all(array.dtype == np.float32 for array in read.values())
    key = "encoder.layer.1.output.LayerNorm.weight"
    np.testing.assert_array_equal(read[key], weights[prefix + key].astype(stored).astype(np.float32))


def change(name: str, array: np.ndarray | None) -> Callable[[Path], None]:
    def apply(checkpoint: Path) -> None:
        weights = load_file(checkpoint / "model.safetensors")
        weights.pop(name, None)
        save_file(weights | ({} if array is None else {name: array}), checkpoint / "model.safetensors")

    return apply


def truncate(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def replace_by_pickle(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")


QUERY = "bert.encoder.layer.0.attention.self.query.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change(QUERY, None), r"encoder\.layer\.0\.attention\.self\.query\.weight of shape \(32, 32\) is missing"),
        (change(QUERY, np.zeros((32, 31))), rf"{QUERY} has shape \(32, 31\), but config\.json expects \(32, 32\)"),
        (change(QUERY, np.full((32, 32), np.nan)), r"self\.query\.weight contains NaN or infinite values"),
        (
            change("bert.encoder.layer.2.output.dense.bias", np.zeros(32)),
            r"layer\.2\.output\.dense\.bias does not belong to the model",
        ),
        (truncate, "truncated, or not a safetensors file"),
        (replace_by_pickle, r"is missing; pytorch_model\.bin is not read"),
    ],
)
def test_damaged_weights_are_refused(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(write_checkpoint(tmp_path))
    with pytest.raises(InvalidCheckpoint, match=r"model\.safetensors: .*" + message):
        graph_of(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architectures", ["BertForMaskedLM"]),
        ("model_type", "roberta"),
        ("model_type", ["bert"]),
        ("hidden_act", "relu"),
        ("position_embedding_type", "relative_key"),
        ("num_hidden_layers", 0),
        ("hidden_size", "32"),
        ("num_attention_heads", 5),
        ("layer_norm_eps", 2),
        ("type_vocab_size", 1),
    ],
)
def test_unsupported_configurations_are_refused(tmp_path: Path, field: str, value: object) -> None:
    file = write_checkpoint(tmp_path) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(InvalidCheckpoint, match=rf"config\.json: .*{field}"):
        read_architecture(tmp_path)


def test_no_directory_and_no_hub_id() -> None:
    with pytest.raises(InvalidCheckpoint, match="not-there: no such directory"):
        find_checkpoint("not-there")
