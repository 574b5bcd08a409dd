"""Test the hardware floor: the formula counts the same operations as the graph."""

import onnx
import pytest

from engine_builder.architectures import build_graph, read_architecture
from engine_builder.benchmarks.hardware_floor import copy_rate, encoder_weights, floor, operations, peak_rate
from engine_builder.checkpoint import read_weights
from engine_builder.targets.openvino import Precision
from tests.support.checkpoints import write_checkpoint


@pytest.mark.parametrize("length", [32, 64])
def test_operations_are_those_of_the_graph(length: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = write_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    architecture = read_architecture(directory)
    encoder = architecture.encoder
    model = build_graph(architecture, read_weights(directory, architecture))
    for tensor in model.graph.input:
        for dimension, value in zip(tensor.type.tensor_type.shape.dim, (1, length), strict=True):
            dimension.dim_value = value
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    shapes = {each.name: list(each.dims) for each in graph.initializer}
    for each in (*graph.value_info, *graph.input, *graph.output):
        shapes[each.name] = [dimension.dim_value for dimension in each.type.tensor_type.shape.dim]
    counted, weights = 0, 0
    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm"):
            left, right = (shapes[name] for name in node.input[:2])
            *batch, rows, inner = left
            product = 2 * rows * inner * right[-1]
            for size in batch:
                product *= size
            counted += product
            weights += right[0] * right[1] if len(right) == 2 and right[-1] != 2 else 0
    assert counted == sum(operations(encoder, length))
    rates: dict[Precision, float] = {"fp32": 10.0, "bf16": 20.0, "int8": 40.0}
    dense, attention = operations(encoder, length)
    assert floor(encoder, length, "fp32", rates) == pytest.approx(counted / 10)
    assert floor(encoder, length, "int8", rates) == pytest.approx(dense / 40 + attention / 20)
    assert weights == encoder_weights(encoder)


def test_rates_are_measured() -> None:
    assert peak_rate("fp32", 0) > 1e9
    assert peak_rate("int8", 0) > 1e9
    assert copy_rate(0, mib=8) > 1e8
