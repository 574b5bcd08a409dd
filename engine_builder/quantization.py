"""Explicit quantization: scales for the inputs of all linear layers, measured on real windows.

TensorRT 11 calibrates nothing by itself; it computes in int8 or fp8 where the graph holds a pair of QuantizeLinear and
DequantizeLinear. A transformer's activations have a few features far larger than the rest, which one scale for all
features cannot hold in 8 bits. SmoothQuant (Xiao et al. 2023, equation 4) divides each feature j by
``s_j = max|x_j|^a / max|w_j|^(1 - a)`` and multiplies the weights by it, which changes no result and leaves the
weights, with a scale for each output, the harder half.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper

from bertqa.windows import Window
from engine_builder.checkpoint import FloatArray

QuantizedType = Literal["int8", "fp8"]
LARGEST: dict[QuantizedType, float] = {"int8": 127, "fp8": 448}
"""Largest magnitude of the type; fp8 is E4M3 (Micikevicius et al. 2022)."""

SMOOTHING = 0.9
"""The exponent ``a``, for int8; docs/benchmarks.md has the sweep. Fp8 keeps small features as exact as large ones."""
_SMALLEST_SCALE = float(np.finfo(np.float16).smallest_normal)


@dataclass(frozen=True, slots=True)
class LinearScales:
    """How a linear layer's input and weight become 8-bit numbers."""

    smoothing: FloatArray | None  # (inputs,), divides the input's features and multiplies the weight's
    input: float  # of the smoothed input, one for all features
    weight: FloatArray  # of the smoothed weight: (outputs,) for int8, () for fp8


@dataclass(frozen=True, slots=True)
class Quantization:
    """Scales for all linear layers of the encoder, by their names."""

    type: QuantizedType
    layers: Mapping[str, LinearScales]


def calibrate(
    reference: Path, weights: Mapping[str, FloatArray], windows: Sequence[Window], kind: QuantizedType
) -> Quantization:
    """Measure scales.

    Args:
        reference: float32 graph of `engine_builder.architectures`.
        weights: that it was written from.
        windows: real ones; their padding is not looked at.
        kind: type to quantize to.

    Raises:
        ValueError: there is no window.
    """
    if not windows:
        raise ValueError("windows: at least one is needed")
    model = onnx.load(reference)
    inputs = {
        node.name.removesuffix(".product"): node.input[0]
        for node in model.graph.node
        if node.op_type == "MatMul" and node.name.startswith("encoder.") and node.name.endswith(".product")
    }
    largest = _largest_features(model, list(dict.fromkeys(inputs.values())), windows)
    layers: dict[str, LinearScales] = {}
    for tensor, features in largest.items():
        sharing = [name for name, value in inputs.items() if value == tensor]
        smoothing = None
        if kind == "int8":
            columns = np.max([np.abs(weights[f"{name}.weight"]).max(axis=0) for name in sharing], axis=0)
            smoothing = np.maximum(features, 1e-5) ** SMOOTHING / np.maximum(columns, 1e-5) ** (1 - SMOOTHING)
        scale = _scale((features if smoothing is None else features / smoothing).max(), kind)
        for name in sharing:
            weight = np.abs(weights[f"{name}.weight"])  # (outputs, inputs)
            weight = weight.max() if smoothing is None else (weight * smoothing).max(axis=1)
            layers[name] = LinearScales(smoothing, float(scale), _scale(weight, kind))
    return Quantization(kind, layers)


def _scale(largest: FloatArray | np.float32, kind: QuantizedType) -> FloatArray:
    """The largest magnitude on the largest number; never zero nor subnormal, for float16 has to hold it too."""
    return np.asarray(np.maximum(largest / LARGEST[kind], _SMALLEST_SCALE), np.float32)


def _largest_features(
    model: onnx.ModelProto, tensors: Sequence[str], windows: Sequence[Window]
) -> dict[str, FloatArray]:
    """Largest magnitude of each feature of each tensor, (features,), over the tokens of all windows."""
    model.graph.output.extend(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in tensors)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    largest: dict[str, FloatArray] = {}
    for window in windows:
        tokens = int(window.attention_mask.sum())
        for name, value in zip(tensors, session.run(list(tensors), window.tensors()), strict=True):
            found = np.abs(value[0, :tokens]).max(axis=0)
            largest[name] = np.maximum(largest.get(name, 0), found)
    return largest
