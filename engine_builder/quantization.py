"""Explicit quantization: measure scales for the inputs of all linear layers on real windows.

TensorRT 11 does not calibrate; it computes in int8 or fp8 where the graph has a pair of QuantizeLinear and
DequantizeLinear. A transformer's activations have a few features far larger than the rest, so a single scale for all
features loses too much in 8 bits. SmoothQuant (Xiao et al. 2023, equation 4) divides each feature j by
``s_j = max|x_j|^a / max|w_j|^(1 - a)`` and multiplies the weights by it. This does not change the result, and moves the
difficulty to the weights, which have one scale per output.
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
"""Largest magnitude of each type; fp8 is E4M3 (Micikevicius et al. 2022)."""

SMOOTHING = 0.9
"""The exponent ``a`` for int8; docs/benchmarks.md has the sweep. Fp8 is as exact for small features as for large."""
_SMALLEST_SCALE = float(np.finfo(np.float16).smallest_normal)


@dataclass(frozen=True, slots=True)
class LinearScales:
    """Scales that convert a linear layer's input and weight to 8 bits."""

    smoothing: FloatArray | None  # (inputs,), divides the input's features and multiplies the weight's
    input: float  # scale of the smoothed input, one for all features
    weight: FloatArray  # scales of the smoothed weight: (outputs,) for int8, () for fp8


@dataclass(frozen=True, slots=True)
class Quantization:
    """Scales for all linear layers of the encoder, by layer name."""

    type: QuantizedType
    layers: Mapping[str, LinearScales]


def calibrate(
    reference: Path, weights: Mapping[str, FloatArray], windows: Sequence[Window], kind: QuantizedType
) -> Quantization:
    """Measure the scales for all linear layers.

    Args:
        reference: float32 graph of `engine_builder.architectures`.
        weights: the weights that the graph was written from.
        windows: real windows; their padding is ignored.
        kind: type to quantize to.

    Raises:
        ValueError: ``windows`` is empty.
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
    """Map the largest magnitude to the type's largest value; never zero or subnormal, also in float16."""
    return np.asarray(np.maximum(largest / LARGEST[kind], _SMALLEST_SCALE), np.float32)


def _largest_features(
    model: onnx.ModelProto, tensors: Sequence[str], windows: Sequence[Window]
) -> dict[str, FloatArray]:
    """Measure the largest magnitude of each feature of each tensor, (features,), over the tokens of all windows."""
    model.graph.output.extend(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in tensors)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    largest: dict[str, FloatArray] = {}
    for window in windows:
        tokens = int(window.attention_mask.sum())
        for name, value in zip(tensors, session.run(list(tensors), window.tensors()), strict=True):
            found = np.abs(value[0, :tokens]).max(axis=0)
            largest[name] = np.maximum(largest.get(name, 0), found)
    return largest
