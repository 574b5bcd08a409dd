"""DistilBERT (Sanh et al. 2019): BERT's encoder with other tensor names and without token types."""

import re
from dataclasses import dataclass

from engine_builder.architectures.config import ConfigFile
from engine_builder.architectures.encoder import Encoder, Shapes, linear_shapes, norm_shapes
from engine_builder.architectures.graph import GraphWriter

_LAYER = re.compile(r"transformer\.layer\.(\d+)\.(.+)\.(weight|bias)")
_NAMES = {
    "attention.q_lin": "attention.self.query",
    "attention.k_lin": "attention.self.key",
    "attention.v_lin": "attention.self.value",
    "attention.out_lin": "attention.output.dense",
    "sa_layer_norm": "attention.output.LayerNorm",
    "ffn.lin1": "intermediate.dense",
    "ffn.lin2": "output.dense",
    "output_layer_norm": "output.LayerNorm",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DistilBert:
    """A ``DistilBertForQuestionAnswering``."""

    vocab_size: int
    max_tokens: int
    encoder: Encoder

    @classmethod
    def read(cls, config: ConfigFile) -> "DistilBert":
        """Read ``config.json``; see `Architecture`."""
        config.require("architectures", ["DistilBertForQuestionAnswering"])
        config.require("activation", "gelu", "gelu")
        config.check_heads("dim", "n_heads")
        return cls(
            vocab_size=config.count("vocab_size"),
            max_tokens=config.count("max_position_embeddings"),
            encoder=Encoder(
                layers=config.count("n_layers"),
                hidden_size=config.count("dim"),
                heads=config.count("n_heads"),
                intermediate_size=config.count("hidden_dim"),
                layer_norm_eps=1e-12,  # fixed in the model's code
            ),
        )

    def shapes(self) -> Shapes:
        """The tensors and their shapes; see `Architecture`."""
        hidden = self.encoder.hidden_size
        return (
            {
                "embeddings.word_embeddings.weight": (self.vocab_size, hidden),
                "embeddings.position_embeddings.weight": (self.max_tokens, hidden),
            }
            | norm_shapes("embeddings.LayerNorm", hidden)
            | self.encoder.shapes()
            | linear_shapes("qa_outputs", 2, hidden)
        )

    def tensor_name(self, stored: str) -> str | None:
        """Rename the layers' tensors as in BERT, and drop the pretraining head; see `Architecture`."""
        name = stored.removeprefix("distilbert.")
        if name.startswith("vocab_") or name == "embeddings.position_ids":
            return None
        if (found := _LAYER.fullmatch(name)) and found[2] in _NAMES:
            return f"encoder.layer.{found[1]}.{_NAMES[found[2]]}.{found[3]}"
        return name

    def write(self, graph: GraphWriter) -> None:
        """Write the nodes; see `Architecture`."""
        words = graph.lookup("embeddings.word_embeddings", "input_ids", "embeddings.words")
        positions = graph.positions("embeddings.position_embeddings", "embeddings.positions")
        total = graph.add("Add", [words, positions], "embeddings.sum")
        embedded = graph.layer_norm("embeddings.LayerNorm", total, self.encoder.layer_norm_eps)
        graph.answer_logits(self.encoder.write(graph, embedded, graph.padding_mask()))
