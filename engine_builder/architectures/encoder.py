"""The encoder of BERT and its relatives: layers of self-attention and a feed-forward network, with post-normalization.

Tensors and nodes have BERT's names in every family (``encoder.layer.0.attention.self.query.weight``). Each family maps
its checkpoints' names to these, so that quantization, fusion in OpenVINO and the tests need only one set of names.
"""

from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from engine_builder.architectures.graph import GraphWriter

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    """The sizes of an encoder."""

    layers: int
    hidden_size: int
    heads: int
    intermediate_size: int  # of the feed-forward network
    layer_norm_eps: float

    def shapes(self) -> Shapes:
        """Return the shapes of the encoder's tensors, by BERT's names."""
        hidden, inner = self.hidden_size, self.intermediate_size
        shapes: Shapes = {}
        for n in range(self.layers):
            for name, rows, columns in (
                ("attention.self.query", hidden, hidden),
                ("attention.self.key", hidden, hidden),
                ("attention.self.value", hidden, hidden),
                ("attention.output.dense", hidden, hidden),
                ("intermediate.dense", inner, hidden),
                ("output.dense", hidden, inner),
            ):
                shapes |= linear_shapes(f"encoder.layer.{n}.{name}", rows, columns)
            for name in ("attention.output.LayerNorm", "output.LayerNorm"):
                shapes |= norm_shapes(f"encoder.layer.{n}.{name}", hidden)
        return shapes

    def write(self, graph: GraphWriter, hidden: str, mask: str) -> str:
        """Write all layers.

        Args:
            graph: the graph to write into.
            hidden: the embedded tokens, (batch, length, hidden size).
            mask: added to the attention scores, float32, broadcastable to (batch, heads, length, length).

        Returns:
            The output of the last layer, with the shape of ``hidden``.
        """
        for n in range(self.layers):
            hidden = self._layer(graph, f"encoder.layer.{n}", hidden, mask)
        return hidden

    def _layer(self, graph: GraphWriter, scope: str, hidden: str, mask: str) -> str:
        attended = self._attention(graph, f"{scope}.attention", hidden, mask)
        inner = graph.gelu(f"{scope}.intermediate", graph.linear(f"{scope}.intermediate.dense", attended))
        output = graph.linear(f"{scope}.output.dense", inner)
        output = graph.add("Add", [output, attended], f"{scope}.output.residual")
        return graph.layer_norm(f"{scope}.output.LayerNorm", output, self.layer_norm_eps)

    def _attention(self, graph: GraphWriter, scope: str, hidden: str, mask: str) -> str:
        width = self.hidden_size // self.heads

        def by_head(part: str, order: list[int]) -> str:
            split = graph.add(
                "Reshape",
                [graph.linear(f"{scope}.self.{part}", hidden), graph.integers([0, 0, self.heads, width])],
                f"{scope}.self.{part}.heads",
            )
            return graph.add("Transpose", [split], f"{scope}.self.{part}.transposed", perm=order)

        query = by_head("query", [0, 2, 1, 3])
        key = by_head("key", [0, 2, 3, 1])
        value = by_head("value", [0, 2, 1, 3])
        if graph.float_type == "float32":  # the order that ONNX Runtime fuses
            root = graph.constant("attention.root_of_width", np.float32(np.sqrt(width)))
            scores = graph.add("MatMul", [query, key], f"{scope}.self.products")
            scores = graph.add("Div", [scores, root], f"{scope}.self.scores")
        else:  # the order that TensorRT fuses; its products are also smaller
            root = graph.number("attention.root_of_width", 1 / np.sqrt(width))
            query = graph.add("Mul", [query, root], f"{scope}.self.query.scaled")
            scores = graph.to(TensorProto.FLOAT, graph.add("MatMul", [query, key], f"{scope}.self.scores"))
        scores = graph.add("Add", [scores, mask], f"{scope}.self.masked_scores")
        shares = graph.to_own_type(graph.add("Softmax", [scores], f"{scope}.self.shares", axis=-1))
        context = graph.add("MatMul", [shares, value], f"{scope}.self.context")
        context = graph.add("Transpose", [context], f"{scope}.self.context_by_token", perm=[0, 2, 1, 3])
        context = graph.add(
            "Reshape", [context, graph.integers([0, 0, self.heads * width])], f"{scope}.self.context_joined"
        )
        output = graph.linear(f"{scope}.output.dense", context)
        output = graph.add("Add", [output, hidden], f"{scope}.output.residual")
        return graph.layer_norm(f"{scope}.output.LayerNorm", output, self.layer_norm_eps)


def linear_shapes(name: str, outputs: int, inputs: int) -> Shapes:
    """Return the tensor shapes of a linear layer."""
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm_shapes(name: str, size: int) -> Shapes:
    """Return the tensor shapes of a layer normalization."""
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}
