"""The checkpoint in ONNX Runtime."""

import numpy as np
import onnxruntime

from loadtest.peers.reading import Array, Reader


def onnxruntime_reader(model: str) -> Reader:
    """A reader whose network is an ONNX file with int32 inputs, on all cores."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [tensor.name for tensor in session.get_inputs()]

    def predict(*tensors: Array) -> tuple[Array, Array]:
        feed = {name: tensor.astype(np.int32) for name, tensor in zip(names, tensors, strict=True)}
        start_logits, end_logits = session.run(["start_logits", "end_logits"], feed)
        return start_logits, end_logits

    return Reader(predict)
