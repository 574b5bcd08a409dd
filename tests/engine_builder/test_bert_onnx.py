"""The hand-written graph against transformers, and checkpoints that it refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import BertForQuestionAnswering

from bertqa.windows import INPUT_NAMES
from engine_builder.bert_onnx import FloatType, build_graph
from engine_builder.checkpoint import BertConfig, InvalidCheckpoint, find_checkpoint, read_weights
from tests.support.checkpoints import write_checkpoint
from tests.support.onnx_graphs import run


def graph_of(checkpoint: Path, float_type: FloatType = "float32") -> onnx.ModelProto:
    config = BertConfig.read(checkpoint / "config.json")
    return build_graph(config, read_weights(checkpoint, config), float_type)


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
    config = BertConfig.read(checkpoint / "config.json")
    read = read_weights(checkpoint, config)
    assert {name: array.shape for name, array in read.items()} == config.shapes()
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
        (change(QUERY, np.zeros((32, 31))), rf"{QUERY} has shape \(32, 31\); config\.json expects \(32, 32\)"),
        (change(QUERY, np.full((32, 32), np.nan)), r"self\.query\.weight holds NaN or infinite values"),
        (change("bert.encoder.layer.2.output.dense.bias", np.zeros(32)), r"layer\.2\.output\.dense\.bias has no place"),
        (truncate, "truncated, or no safetensors file"),
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
        BertConfig.read(file)


def test_no_directory_and_no_hub_id() -> None:
    with pytest.raises(InvalidCheckpoint, match="not-there: no such directory"):
        find_checkpoint("not-there")
