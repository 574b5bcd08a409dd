"""Model families that the builder can write as a graph, without torch.

A family is one file here with a class that follows `Architecture`, and one line in `FAMILIES`. The class reads
``config.json``, says which tensors it needs and by which names checkpoints store them, and writes the graph with the
parts of `GraphWriter`.
"""

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import onnx

from engine_builder.architectures.bert import Bert
from engine_builder.architectures.config import ConfigFile
from engine_builder.architectures.distilbert import DistilBert
from engine_builder.architectures.electra import Electra
from engine_builder.architectures.encoder import Encoder, Shapes
from engine_builder.architectures.graph import FloatType, GraphWriter
from engine_builder.checkpoint import CONFIG_FILE, FloatArray, InvalidCheckpoint
from engine_builder.quantization import Quantization


class Architecture(Protocol):
    """A checkpoint's model as its ``config.json`` describes it."""

    @classmethod
    def read(cls, config: ConfigFile) -> "Architecture":
        """Read and check ``config.json``.

        Raises:
            InvalidCheckpoint: a field is missing, or has a value that the graph cannot express.
        """

    @property
    def vocab_size(self) -> int:
        """Token ids that the embeddings have a row for."""

    @property
    def max_tokens(self) -> int:
        """The longest window that the positions allow, special tokens included."""

    @property
    def encoder(self) -> Encoder:
        """The sizes of the layers."""

    def shapes(self) -> Shapes:
        """Every tensor that the graph needs, and its shape."""

    def tensor_name(self, stored: str) -> str | None:
        """The name in ``shapes()`` of a tensor of the checkpoint; None if the graph does not need it."""

    def write(self, graph: GraphWriter) -> None:
        """Write all nodes, from the inputs to the two logits of every token."""


FAMILIES: Mapping[str, type[Architecture]] = {"bert": Bert, "distilbert": DistilBert, "electra": Electra}
"""By ``model_type`` of ``config.json``."""


def read_architecture(checkpoint: Path) -> Architecture:
    """Read ``config.json`` of a checkpoint's directory.

    Raises:
        InvalidCheckpoint: it is missing, malformed, or of a model that is not supported; the message names the field.
    """
    config = ConfigFile.read(checkpoint / CONFIG_FILE)
    found = config.values.get("model_type", "bert")
    family = FAMILIES.get(found) if isinstance(found, str) else None
    if family is None:
        raise InvalidCheckpoint(
            f"{config.path}: model_type is {reprlib.repr(found)}; supported are {', '.join(FAMILIES)}"
        )
    return family.read(config)


def build_graph(
    architecture: Architecture,
    weights: Mapping[str, FloatArray],
    float_type: FloatType = "float32",
    quantization: Quantization | None = None,
) -> onnx.ModelProto:
    """Write the graph.

    Args:
        architecture: of the checkpoint.
        weights: float32 tensors by the names of ``architecture.shapes()``.
        float_type: type of weights, matrix products and activations. Layer normalization and softmax always compute
            in float32, and the outputs are float32.
        quantization: scales for the linear layers of the encoder; without them nothing is quantized.

    Returns:
        A checked model: int32 (batch, length) inputs by `INPUT_NAMES`, float32 (batch, length) outputs by
        `OUTPUT_NAMES`.
    """
    graph = GraphWriter(weights, float_type, quantization)
    architecture.write(graph)
    model = graph.model()
    onnx.checker.check_model(model, full_check=True)
    return model
