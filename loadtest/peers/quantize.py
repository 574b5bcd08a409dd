"""ONNX Runtime's own way to int8: fuse the transformer, then quantize its weights, and activations as they come.

python -m loadtest.peers.quantize CHECKPOINT model.onnx model.int8.onnx
"""

import json
import logging
import sys
from pathlib import Path

import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.transformers import optimizer


def quantize(checkpoint: Path, source: Path, destination: Path) -> None:
    """Write an int8 model beside a float32 one."""
    logging.getLogger("onnxruntime.transformers").setLevel(logging.ERROR)  # it warns of graphs that torch did not make
    config = json.loads((checkpoint / "config.json").read_bytes())
    fused = optimizer.optimize_model(
        str(source),
        model_type="bert",
        num_heads=config["num_attention_heads"],
        hidden_size=config["hidden_size"],
        opt_level=0,
    )
    fused.save_model_to_file(str(destination))
    quantize_dynamic(
        destination,
        destination,
        op_types_to_quantize=["MatMul", "Attention"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},  # shapes of fused operators are not inferred
    )


if __name__ == "__main__":
    quantize(*map(Path, sys.argv[1:]))
