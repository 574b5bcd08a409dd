"""Weights -> the ONNX graph of BERT for question answering, written node by node.

One graph serves every target: inputs and outputs as in `bertqa.windows`, dynamic batch and length. Written by hand it
needs no torch, keeps stable names, and holds just the patterns (attention, erf GELU, LayerNormalization) that ONNX
Runtime, OpenVINO and TensorRT fuse. For TensorRT, which from version 11 on takes every type from the graph, it is
written in half precision, with the types of all tensors stated, and quantized where asked.

    python -m engine_builder.bert_onnx CHECKPOINT model.onnx    # writes the float32 graph alone, for other runtimes
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from bertqa.windows import INPUT_NAMES, OUTPUT_NAMES
from engine_builder.checkpoint import CONFIG_FILE, BertConfig, FloatArray, read_weights
from engine_builder.quantization import Quantization

OPSET = 17  # the first with LayerNormalization
IR_VERSION = 8  # the one of that opset: older runtimes read it
QUANTIZED_OPSET = 19  # the first with half-precision scales, and with fp8; TensorRT 10.0 reads up to 20
QUANTIZED_IR_VERSION = 9

MASK_VALUE = -10_000.0
"""Added to the attention score of padding: vanishes in softmax, yet finite in every float type. The lowest float32
would round to infinity in bfloat16, and 0 * infinity is NaN."""

FloatType = Literal["float32", "float16", "bfloat16"]
_ELEMENT_TYPES: dict[FloatType, int] = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
}


_QUANTIZED_TYPES = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}


def build_graph(
    config: BertConfig,
    weights: Mapping[str, FloatArray],
    float_type: FloatType = "float32",
    quantization: Quantization | None = None,
) -> onnx.ModelProto:
    """Write the graph.

    Args:
        config: of the checkpoint.
        weights: float32 tensors by the names of ``config.shapes()``.
        float_type: type of weights, matrix products and activations. Layer normalization and softmax always compute
            in float32, and the outputs are float32.
        quantization: scales for the linear layers of the encoder; without them nothing is quantized.

    Returns:
        A checked model: int32 (batch, length) inputs by `INPUT_NAMES`, float32 (batch, length) outputs by
        `OUTPUT_NAMES`.
    """
    graph = _Graph(config, weights, _ELEMENT_TYPES[float_type], quantization)
    hidden = graph.embeddings()
    mask = graph.additive_mask()
    for n in range(config.num_hidden_layers):
        hidden = graph.layer(f"encoder.layer.{n}", hidden, mask)
    graph.qa_outputs(hidden)
    model = graph.model()
    onnx.checker.check_model(model, full_check=True)
    return model


class _Graph:
    """Collects nodes and initializers; every method adds some and returns the name of the value it leaves."""

    def __init__(
        self,
        config: BertConfig,
        weights: Mapping[str, FloatArray],
        element_type: int,
        quantization: Quantization | None,
    ) -> None:
        self._config = config
        self._weights = weights
        self._type = element_type
        self._quantization = quantization
        self._dequantized: dict[str, str] = {}  # by the value that was quantized: several layers share an input
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}

    def embeddings(self) -> str:
        scope = "embeddings"
        words = self._add("Gather", [self._weight(f"{scope}.word_embeddings.weight"), "input_ids"], f"{scope}.words")
        kinds = self._add(
            "Gather", [self._weight(f"{scope}.token_type_embeddings.weight"), "token_type_ids"], f"{scope}.token_types"
        )
        shape = self._add("Shape", ["input_ids"], f"{scope}.shape")
        length = self._add("Gather", [shape, self._integers([1])], f"{scope}.length")  # (1,)
        positions = self._add(
            "Slice",
            [self._weight(f"{scope}.position_embeddings.weight"), self._integers([0]), length, self._integers([0])],
            f"{scope}.positions",
        )
        total = self._add("Add", [words, kinds], f"{scope}.words_and_types")
        total = self._add("Add", [total, positions], f"{scope}.sum")
        return self._layer_norm(f"{scope}.LayerNorm", total)

    def additive_mask(self) -> str:
        """0 for tokens and `MASK_VALUE` for padding, float32 (batch, 1, 1, length)."""
        mask = "attention_mask"
        for axis in (1, 2):  # one at a time, as ONNX Runtime's attention fusion expects
            mask = self._add("Unsqueeze", [mask, self._integers([axis])], f"mask.unsqueezed_{axis}")
        mask = self._add("Cast", [mask], "mask.float", to=TensorProto.FLOAT)
        padding = self._add("Sub", [self._constant("mask.one", np.float32(1)), mask], "mask.padding")
        return self._add("Mul", [padding, self._constant("mask.value", np.float32(MASK_VALUE))], "mask.additive")

    def layer(self, scope: str, hidden: str, mask: str) -> str:
        """One encoder block; ``hidden`` is (batch, length, hidden size), in and out."""
        attended = self._attention(f"{scope}.attention", hidden, mask)
        inner = self._gelu(f"{scope}.intermediate", self._linear(f"{scope}.intermediate.dense", attended))
        output = self._linear(f"{scope}.output.dense", inner)
        output = self._add("Add", [output, attended], f"{scope}.output.residual")
        return self._layer_norm(f"{scope}.output.LayerNorm", output)

    def qa_outputs(self, hidden: str) -> None:
        logits = self._to(TensorProto.FLOAT, self._linear("qa_outputs", hidden))  # (batch, length, 2)
        halves = [f"qa_outputs.{name}" for name in OUTPUT_NAMES]
        self._nodes.append(
            helper.make_node("Split", [logits, self._integers([1, 1])], halves, "qa_outputs.split", axis=-1)
        )
        for half, name in zip(halves, OUTPUT_NAMES, strict=True):
            self._nodes.append(helper.make_node("Squeeze", [half, self._integers([-1])], [name], name))

    def model(self) -> onnx.ModelProto:
        shape = ["batch", "length"]
        graph = helper.make_graph(
            self._nodes,
            "bert_for_question_answering",
            [helper.make_tensor_value_info(name, TensorProto.INT32, shape) for name in INPUT_NAMES],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in OUTPUT_NAMES],
            list(self._initializers.values()),
        )
        opset, ir_version = (QUANTIZED_OPSET, QUANTIZED_IR_VERSION) if self._quantization else (OPSET, IR_VERSION)
        imports = [helper.make_opsetid("", opset)]
        return helper.make_model(graph, opset_imports=imports, ir_version=ir_version, producer_name="bertqa")

    def _attention(self, scope: str, hidden: str, mask: str) -> str:
        heads = self._config.num_attention_heads
        width = self._config.hidden_size // heads

        def by_head(part: str, order: list[int]) -> str:
            split = self._add(
                "Reshape",
                [self._linear(f"{scope}.self.{part}", hidden), self._integers([0, 0, heads, width])],
                f"{scope}.self.{part}.heads",
            )
            return self._add("Transpose", [split], f"{scope}.self.{part}.transposed", perm=order)

        query = by_head("query", [0, 2, 1, 3])
        key = by_head("key", [0, 2, 3, 1])
        value = by_head("value", [0, 2, 1, 3])
        if self._type == TensorProto.FLOAT:  # the order that ONNX Runtime fuses
            root = self._constant("attention.root_of_width", np.float32(np.sqrt(width)))
            scores = self._add("MatMul", [query, key], f"{scope}.self.products")
            scores = self._add("Div", [scores, root], f"{scope}.self.scores")
        else:  # the order that TensorRT fuses, in which the products are smaller too
            root = self._constant_of_type("attention.root_of_width", 1 / np.sqrt(width))
            query = self._add("Mul", [query, root], f"{scope}.self.query.scaled")
            scores = self._to(TensorProto.FLOAT, self._add("MatMul", [query, key], f"{scope}.self.scores"))
        scores = self._add("Add", [scores, mask], f"{scope}.self.masked_scores")
        shares = self._to(self._type, self._add("Softmax", [scores], f"{scope}.self.shares", axis=-1))
        context = self._add("MatMul", [shares, value], f"{scope}.self.context")
        context = self._add("Transpose", [context], f"{scope}.self.context_by_token", perm=[0, 2, 1, 3])
        context = self._add("Reshape", [context, self._integers([0, 0, heads * width])], f"{scope}.self.context_joined")
        output = self._linear(f"{scope}.output.dense", context)
        output = self._add("Add", [output, hidden], f"{scope}.output.residual")
        return self._layer_norm(f"{scope}.output.LayerNorm", output)

    def _linear(self, scope: str, value: str) -> str:
        if self._quantization and scope in self._quantization.layers:
            value, weight = self._quantized(scope, value, self._quantization)
        else:
            weight = self._weight(f"{scope}.weight", transpose=True)
        product = self._add("MatMul", [value, weight], f"{scope}.product")
        return self._add("Add", [product, self._weight(f"{scope}.bias")], f"{scope}.sum")

    def _quantized(self, scope: str, value: str, quantization: Quantization) -> tuple[str, str]:
        """A linear layer's input and weight, both quantized and back; TensorRT multiplies the 8-bit numbers between."""
        scales = quantization.layers[scope]
        kind = helper.tensor_dtype_to_np_dtype(_QUANTIZED_TYPES[quantization.type])

        def there_and_back(name: str, value: str, scale: "FloatArray | np.float32", **axis: int) -> str:
            parameters = [
                self._constant(f"{name}.scale", self._typed(scale)),
                self._constant(f"{name}.zero", np.zeros(np.shape(scale), kind)),
            ]
            quantized = self._add("QuantizeLinear", [value, *parameters], f"{name}.quantized", **axis)
            return self._add("DequantizeLinear", [quantized, *parameters], f"{name}.dequantized", **axis)

        if value not in self._dequantized:
            smoothed = value
            if scales.smoothing is not None:
                factors = self._constant(f"{value}.smoothing", self._typed(np.reciprocal(scales.smoothing)))
                smoothed = self._add("Mul", [value, factors], f"{value}.smoothed")
            self._dequantized[value] = there_and_back(value, smoothed, np.float32(scales.input))
        weight = self._weights[f"{scope}.weight"]
        weight = weight if scales.smoothing is None else weight * scales.smoothing
        name = self._constant(f"{scope}.weight", self._typed(weight.T))
        axis = {"axis": 1} if scales.weight.ndim else {}  # one scale for each output
        return self._dequantized[value], there_and_back(f"{scope}.weight", name, scales.weight, **axis)

    def _gelu(self, scope: str, value: str) -> str:
        """Half of x * (1 + erf(x / sqrt 2)), in the order of operations that the runtimes fuse."""
        scaled = self._add("Div", [value, self._constant_of_type("gelu.root_of_two", np.sqrt(2))], f"{scope}.scaled")
        bent = self._add("Erf", [scaled], f"{scope}.erf")
        bent = self._add("Add", [bent, self._constant_of_type("gelu.one", 1)], f"{scope}.erf_plus_one")
        product = self._add("Mul", [value, bent], f"{scope}.doubled")
        return self._add("Mul", [product, self._constant_of_type("gelu.half", 0.5)], f"{scope}.gelu")

    def _layer_norm(self, scope: str, value: str) -> str:
        parameters = [
            self._constant(f"{scope}.{part}", self._weights[f"{scope}.{part}"]) for part in ("weight", "bias")
        ]
        normed = self._add(
            "LayerNormalization",
            [self._to(TensorProto.FLOAT, value), *parameters],
            f"{scope}.normed",
            axis=-1,
            epsilon=self._config.layer_norm_eps,
        )
        return self._to(self._type, normed)

    def _to(self, element_type: int, value: str) -> str:
        """Cast between float32 and the graph's own type; nothing where that is float32."""
        if self._type == TensorProto.FLOAT:
            return value
        name = helper.tensor_dtype_to_string(element_type).removeprefix("TensorProto.").lower()
        return self._add("Cast", [value], f"{value}.{name}", to=element_type)

    def _weight(self, name: str, *, transpose: bool = False) -> str:
        array = self._weights[name]
        return self._constant(name, self._typed(array.T if transpose else array))

    def _constant_of_type(self, name: str, value: float) -> str:
        return self._constant(name, self._typed(np.float32(value)))

    def _typed(self, array: "FloatArray | np.float32") -> NDArray[np.generic]:
        return np.asarray(array).astype(helper.tensor_dtype_to_np_dtype(self._type))

    def _integers(self, values: Sequence[int]) -> str:
        return self._constant("integers." + "_".join(map(str, values)), np.array(values, dtype=np.int64))

    def _constant(self, name: str, array: "NDArray[np.generic] | np.float32") -> str:
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(np.asarray(array, order="C"), name)
        return name

    def _add(self, operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self._nodes.append(helper.make_node(operator, list(inputs), [output], name=output, **attributes))
        return output


if __name__ == "__main__":
    checkpoint, destination = map(Path, sys.argv[1:])
    bert = BertConfig.read(checkpoint / CONFIG_FILE)
    onnx.save(build_graph(bert, read_weights(checkpoint, bert)), destination)
