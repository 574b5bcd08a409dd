"""Write a checkpoint's float32 ONNX graph for use in other runtimes.

python -m engine_builder.architectures CHECKPOINT model.onnx
"""

import sys
from pathlib import Path

import onnx

from engine_builder.architectures import build_graph, read_architecture
from engine_builder.checkpoint import InvalidCheckpoint, read_weights


def main(checkpoint: Path, destination: Path) -> None:
    """Read the checkpoint and write the graph.

    Raises:
        InvalidCheckpoint: the checkpoint is incomplete, malformed or not supported.
    """
    architecture = read_architecture(checkpoint)
    onnx.save(build_graph(architecture, read_weights(checkpoint, architecture)), destination)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        main(*map(Path, sys.argv[1:]))
    except InvalidCheckpoint as error:
        sys.exit(f"engine_builder.architectures: {error}")
