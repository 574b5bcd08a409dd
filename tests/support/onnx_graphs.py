"""Graphs run by ONNX Runtime."""

import numpy as np
import onnx
import onnxruntime as ort

from bertqa.windows import OUTPUT_NAMES


def run(model: onnx.ModelProto, tensors: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(list(OUTPUT_NAMES), tensors))
