"""BERT (Devlin et al. 2018): the encoder reads the normalized sum of word, position and token-type embeddings."""

import re
from dataclasses import dataclass

from engine_builder.architectures.config import ConfigFile
from engine_builder.architectures.encoder import Encoder, Shapes, linear_shapes, norm_shapes
from engine_builder.architectures.graph import GraphWriter

_LAYER_NORM_OF_TENSORFLOW = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
_UNUSED = re.compile(r"pooler\..*|embeddings\.(position|token_type)_ids|cls\..*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bert:
    """A ``BertForQuestionAnswering``."""

    vocab_size: int
    max_tokens: int
    token_types: int
    encoder: Encoder

    @classmethod
    def read(cls, config: ConfigFile) -> "Bert":
        """Read ``config.json``; see `Architecture`."""
        config.require("architectures", ["BertForQuestionAnswering"])
        return cls(
            vocab_size=config.count("vocab_size"),
            max_tokens=config.count("max_position_embeddings"),
            token_types=config.count("type_vocab_size"),
            encoder=read_encoder(config),
        )

    def shapes(self) -> Shapes:
        """The tensors and their shapes; see `Architecture`."""
        return (
            embedding_shapes(self.vocab_size, self.max_tokens, self.token_types, self.encoder.hidden_size)
            | self.encoder.shapes()
            | linear_shapes("qa_outputs", 2, self.encoder.hidden_size)
        )

    def tensor_name(self, stored: str) -> str | None:
        """Drop the prefix, poolers, pretraining heads and buffers; see `Architecture`."""
        return bert_name(stored.removeprefix("bert."))

    def write(self, graph: GraphWriter) -> None:
        """Write the nodes; see `Architecture`."""
        embedded = write_embeddings(graph, self.encoder.layer_norm_eps)
        graph.answer_logits(self.encoder.write(graph, embedded, graph.padding_mask()))


def read_encoder(config: ConfigFile) -> Encoder:
    """Read the encoder's sizes from the fields of BERT's ``config.json``.

    Raises:
        InvalidCheckpoint: a field is missing or has a value that the graph cannot express.
    """
    config.require("hidden_act", "gelu", "gelu")
    config.require("position_embedding_type", "absolute", "absolute")
    config.check_heads("hidden_size", "num_attention_heads")
    config.check_token_types()
    return Encoder(
        layers=config.count("num_hidden_layers"),
        hidden_size=config.count("hidden_size"),
        heads=config.count("num_attention_heads"),
        intermediate_size=config.count("intermediate_size"),
        layer_norm_eps=config.epsilon("layer_norm_eps", 1e-12),
    )


def embedding_shapes(vocab_size: int, positions: int, token_types: int, size: int) -> Shapes:
    """Return the shapes of the embedding tensors, with ``size`` numbers per row."""
    return {
        "embeddings.word_embeddings.weight": (vocab_size, size),
        "embeddings.position_embeddings.weight": (positions, size),
        "embeddings.token_type_embeddings.weight": (token_types, size),
    } | norm_shapes("embeddings.LayerNorm", size)


def bert_name(name: str) -> str | None:
    """Remove the family's prefix from a tensor name, and rename TensorFlow's layer normalization parameters."""
    if _UNUSED.fullmatch(name):
        return None
    for old, new in _LAYER_NORM_OF_TENSORFLOW.items():
        name = name.replace(old, new)
    return name


def write_embeddings(graph: GraphWriter, epsilon: float) -> str:
    """Write the normalized sum of the three embeddings, (batch, length, size)."""
    words = graph.lookup("embeddings.word_embeddings", "input_ids", "embeddings.words")
    types = graph.lookup("embeddings.token_type_embeddings", "token_type_ids", "embeddings.token_types")
    positions = graph.positions("embeddings.position_embeddings", "embeddings.positions")
    total = graph.add("Add", [words, types], "embeddings.words_and_types")
    total = graph.add("Add", [total, positions], "embeddings.sum")
    return graph.layer_norm("embeddings.LayerNorm", total, epsilon)
