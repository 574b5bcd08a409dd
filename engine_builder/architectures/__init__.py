"""Model families that the builder can write as an ONNX graph, without torch.

To add a family, add a file here with a class that implements `Architecture`, and a line in `FAMILIES`. The class reads
``config.json``, lists the tensors it needs and their names in checkpoints, and writes the graph with `GraphWriter`.
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
    """The model that a checkpoint's ``config.json`` describes."""

    @classmethod
    def read(cls, config: ConfigFile) -> "Architecture":
        """Read and check ``config.json``.

        Raises:
            InvalidCheckpoint: a field is missing, or has a value that the graph cannot express.
        """

    @property
    def vocab_size(self) -> int:
        """Number of rows of the word embeddings."""

    @property
    def max_tokens(self) -> int:
        """Longest window that the position embeddings allow, in tokens, special tokens included."""

    @property
    def encoder(self) -> Encoder:
        """Sizes of the encoder's layers."""

    def shapes(self) -> Shapes:
        """Return the shape of every tensor that the graph needs, by name."""

    def tensor_name(self, stored: str) -> str | None:
        """Map a tensor name of the checkpoint to its name in ``shapes()``, or to None if the graph does not need it."""

    def write(self, graph: GraphWriter) -> None:
        """Write all nodes, from the inputs to the start and end logits of every token."""


FAMILIES: Mapping[str, type[Architecture]] = {"bert": Bert, "distilbert": DistilBert, "electra": Electra}
"""Families by the ``model_type`` of ``config.json``."""


def read_architecture(checkpoint: Path) -> Architecture:
    """Read the ``config.json`` of a checkpoint directory.

    Raises:
        InvalidCheckpoint: the file is missing or malformed, or the model is not supported; the message names the field.
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
    """Write the ONNX graph of a checkpoint.

    Args:
        architecture: the checkpoint's model.
        weights: float32 tensors by the names of ``architecture.shapes()``.
        float_type: type of weights, matrix products and activations. Layer normalization and softmax always compute
            in float32, and the outputs are float32.
        quantization: scales for the linear layers of the encoder; without them nothing is quantized.

    Returns:
        A checked model: int32 inputs (batch, length) named `INPUT_NAMES`, float32 outputs (batch, length) named
        `OUTPUT_NAMES`.
    """
    graph = GraphWriter(weights, float_type, quantization)
    architecture.write(graph)
    model = graph.model()
    onnx.checker.check_model(model, full_check=True)
    return model
