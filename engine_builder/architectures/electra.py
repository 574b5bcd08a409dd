"""ELECTRA (Clark et al. 2020): BERT with embeddings that may be narrower than the encoder, and a projection between."""

from dataclasses import dataclass

from engine_builder.architectures.bert import bert_name, embedding_shapes, read_encoder, write_embeddings
from engine_builder.architectures.config import ConfigFile
from engine_builder.architectures.encoder import Encoder, Shapes, linear_shapes
from engine_builder.architectures.graph import GraphWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class Electra:
    """An ``ElectraForQuestionAnswering``."""

    vocab_size: int
    max_tokens: int
    token_types: int
    embedding_size: int
    encoder: Encoder

    @classmethod
    def read(cls, config: ConfigFile) -> "Electra":
        """Read ``config.json``; see `Architecture`."""
        config.require("architectures", ["ElectraForQuestionAnswering"])
        return cls(
            vocab_size=config.count("vocab_size"),
            max_tokens=config.count("max_position_embeddings"),
            token_types=config.count("type_vocab_size"),
            embedding_size=config.count("embedding_size"),
            encoder=read_encoder(config),
        )

    @property
    def is_projected(self) -> bool:
        """Whether a linear layer projects the embeddings to the encoder's size."""
        return self.embedding_size != self.encoder.hidden_size

    def shapes(self) -> Shapes:
        """The tensors and their shapes; see `Architecture`."""
        hidden = self.encoder.hidden_size
        return (
            embedding_shapes(self.vocab_size, self.max_tokens, self.token_types, self.embedding_size)
            | (linear_shapes("embeddings_project", hidden, self.embedding_size) if self.is_projected else {})
            | self.encoder.shapes()
            | linear_shapes("qa_outputs", 2, hidden)
        )

    def tensor_name(self, stored: str) -> str | None:
        """Drop the prefix and the pretraining heads; see `Architecture`."""
        if stored.startswith(("generator_", "discriminator_")):
            return None
        return bert_name(stored.removeprefix("electra."))

    def write(self, graph: GraphWriter) -> None:
        """Write the nodes; see `Architecture`."""
        embedded = write_embeddings(graph, self.encoder.layer_norm_eps)
        if self.is_projected:
            embedded = graph.linear("embeddings_project", embedded)
        graph.answer_logits(self.encoder.write(graph, embedded, graph.padding_mask()))
