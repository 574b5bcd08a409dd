"""Write an ONNX graph node by node.

One graph serves every target: inputs and outputs as in `bertqa.windows`, dynamic batch and length. Writing it directly
needs no torch, keeps names stable, and produces exactly the patterns (attention, erf GELU, LayerNormalization) that
ONNX Runtime, OpenVINO and TensorRT fuse. TensorRT 11 and later takes every type from the graph, so its graph is written
in half precision with all tensor types stated, and quantized if requested.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from bertqa.windows import INPUT_NAMES, OUTPUT_NAMES
from engine_builder.checkpoint import FloatArray
from engine_builder.quantization import Quantization

OPSET = 17  # the first with LayerNormalization
IR_VERSION = 8  # the version of that opset, so that older runtimes can read it
QUANTIZED_OPSET = 19  # the first with half-precision scales, and with fp8; TensorRT 10.0 reads up to 20
QUANTIZED_IR_VERSION = 9

MASK_VALUE = -10_000.0
"""Added to the attention scores of padding. Softmax turns it to 0, and it is finite in every float type: the lowest
float32 would round to infinity in bfloat16, and 0 * infinity is NaN."""

FloatType = Literal["float32", "float16", "bfloat16"]
_ELEMENT_TYPES: dict[FloatType, int] = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
}
_QUANTIZED_TYPES = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}


class GraphWriter:
    """Collects nodes and initializers; every method adds some and returns the name of its output."""

    def __init__(
        self, weights: Mapping[str, FloatArray], float_type: FloatType, quantization: Quantization | None
    ) -> None:
        self.float_type = float_type
        self._weights = weights
        self._type = _ELEMENT_TYPES[float_type]
        self._quantization = quantization
        self._dequantized: dict[str, str] = {}  # keyed by the quantized value, because several layers share an input
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}

    def lookup(self, scope: str, ids: str, output: str) -> str:
        """Look up rows of an embedding table, (batch, length, size)."""
        return self.add("Gather", [self._weight(f"{scope}.weight"), ids], output)

    def positions(self, scope: str, output: str) -> str:
        """Take the first ``length`` rows of a position table, for windows of that many tokens: (length, size)."""
        shape = self.add("Shape", ["input_ids"], "embeddings.shape")
        length = self.add("Gather", [shape, self.integers([1])], "embeddings.length")  # (1,)
        bounds = [self.integers([0]), length, self.integers([0])]
        return self.add("Slice", [self._weight(f"{scope}.weight"), *bounds], output)

    def padding_mask(self) -> str:
        """Add the attention mask: 0 for tokens and `MASK_VALUE` for padding, float32 (batch, 1, 1, length)."""
        mask = "attention_mask"
        for axis in (1, 2):  # one at a time, as ONNX Runtime's attention fusion expects
            mask = self.add("Unsqueeze", [mask, self.integers([axis])], f"mask.unsqueezed_{axis}")
        mask = self.add("Cast", [mask], "mask.float", to=TensorProto.FLOAT)
        padding = self.add("Sub", [self.constant("mask.one", np.float32(1)), mask], "mask.padding")
        return self.add("Mul", [padding, self.constant("mask.value", np.float32(MASK_VALUE))], "mask.additive")

    def answer_logits(self, hidden: str) -> None:
        """Add the graph's outputs: ``qa_outputs`` of (batch, length, hidden size), split into start and end."""
        logits = self.to(TensorProto.FLOAT, self.linear("qa_outputs", hidden))  # (batch, length, 2)
        halves = [f"qa_outputs.{name}" for name in OUTPUT_NAMES]
        self._nodes.append(
            helper.make_node("Split", [logits, self.integers([1, 1])], halves, "qa_outputs.split", axis=-1)
        )
        for half, name in zip(halves, OUTPUT_NAMES, strict=True):
            self._nodes.append(helper.make_node("Squeeze", [half, self.integers([-1])], [name], name))

    def model(self) -> onnx.ModelProto:
        """Return the model as written, without checking it."""
        shape = ["batch", "length"]
        graph = helper.make_graph(
            self._nodes,
            "question_answering",
            [helper.make_tensor_value_info(name, TensorProto.INT32, shape) for name in INPUT_NAMES],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in OUTPUT_NAMES],
            list(self._initializers.values()),
        )
        opset, ir_version = (QUANTIZED_OPSET, QUANTIZED_IR_VERSION) if self._quantization else (OPSET, IR_VERSION)
        imports = [helper.make_opsetid("", opset)]
        return helper.make_model(graph, opset_imports=imports, ir_version=ir_version, producer_name="bertqa")

    def linear(self, scope: str, value: str) -> str:
        """Add a linear layer, quantized if the writer has scales for it."""
        if self._quantization and scope in self._quantization.layers:
            value, weight = self._quantized(scope, value, self._quantization)
        else:
            weight = self._weight(f"{scope}.weight", transpose=True)
        product = self.add("MatMul", [value, weight], f"{scope}.product")
        return self.add("Add", [product, self._weight(f"{scope}.bias")], f"{scope}.sum")

    def _quantized(self, scope: str, value: str, quantization: Quantization) -> tuple[str, str]:
        """Quantize and dequantize a linear layer's input and weight; TensorRT fuses this into an 8-bit product."""
        scales = quantization.layers[scope]
        kind = helper.tensor_dtype_to_np_dtype(_QUANTIZED_TYPES[quantization.type])

        def there_and_back(name: str, value: str, scale: FloatArray | np.float32, **axis: int) -> str:
            parameters = [
                self.constant(f"{name}.scale", self._typed(scale)),
                self.constant(f"{name}.zero", np.zeros(np.shape(scale), kind)),
            ]
            quantized = self.add("QuantizeLinear", [value, *parameters], f"{name}.quantized", **axis)
            return self.add("DequantizeLinear", [quantized, *parameters], f"{name}.dequantized", **axis)

        if value not in self._dequantized:
            smoothed = value
            if scales.smoothing is not None:
                factors = self.constant(f"{value}.smoothing", self._typed(np.reciprocal(scales.smoothing)))
                smoothed = self.add("Mul", [value, factors], f"{value}.smoothed")
            self._dequantized[value] = there_and_back(value, smoothed, np.float32(scales.input))
        weight = self._weights[f"{scope}.weight"]
        weight = weight if scales.smoothing is None else weight * scales.smoothing
        name = self.constant(f"{scope}.weight", self._typed(weight.T))
        axis = {"axis": 1} if scales.weight.ndim else {}  # one scale per output
        return self._dequantized[value], there_and_back(f"{scope}.weight", name, scales.weight, **axis)

    def gelu(self, scope: str, value: str) -> str:
        """Add the erf GELU, x * (1 + erf(x / sqrt 2)) / 2, in the order of operations that the runtimes fuse."""
        scaled = self.add("Div", [value, self.number("gelu.root_of_two", np.sqrt(2))], f"{scope}.scaled")
        bent = self.add("Erf", [scaled], f"{scope}.erf")
        bent = self.add("Add", [bent, self.number("gelu.one", 1)], f"{scope}.erf_plus_one")
        product = self.add("Mul", [value, bent], f"{scope}.doubled")
        return self.add("Mul", [product, self.number("gelu.half", 0.5)], f"{scope}.gelu")

    def layer_norm(self, scope: str, value: str, epsilon: float) -> str:
        """Add layer normalization over the last axis, computed in float32."""
        parameters = [self.constant(f"{scope}.{part}", self._weights[f"{scope}.{part}"]) for part in ("weight", "bias")]
        normed = self.add(
            "LayerNormalization",
            [self.to(TensorProto.FLOAT, value), *parameters],
            f"{scope}.normed",
            axis=-1,
            epsilon=epsilon,
        )
        return self.to_own_type(normed)

    def to_own_type(self, value: str) -> str:
        """Cast to the type of weights and activations."""
        return self.to(self._type, value)

    def to(self, element_type: int, value: str) -> str:
        """Cast between float32 and the graph's own type; adds nothing if that is float32."""
        if self._type == TensorProto.FLOAT:
            return value
        name = helper.tensor_dtype_to_string(element_type).removeprefix("TensorProto.").lower()
        return self.add("Cast", [value], f"{value}.{name}", to=element_type)

    def _weight(self, name: str, *, transpose: bool = False) -> str:
        array = self._weights[name]
        return self.constant(name, self._typed(array.T if transpose else array))

    def number(self, name: str, value: float) -> str:
        """Add a constant of the type of weights and activations."""
        return self.constant(name, self._typed(np.float32(value)))

    def _typed(self, array: FloatArray | np.float32) -> NDArray[np.generic]:
        return np.asarray(array).astype(helper.tensor_dtype_to_np_dtype(self._type))

    def integers(self, values: Sequence[int]) -> str:
        """Add a constant int64 vector."""
        return self.constant("integers." + "_".join(map(str, values)), np.array(values, dtype=np.int64))

    def constant(self, name: str, array: NDArray[np.generic] | np.float32) -> str:
        """Add a constant; an existing name keeps its value."""
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(np.asarray(array, order="C"), name)
        return name

    def add(self, operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Add a node with one output; node and output have the same name."""
        self._nodes.append(helper.make_node(operator, list(inputs), [output], name=output, **attributes))
        return output
