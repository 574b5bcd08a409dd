"""Ways to corrupt a checkpoint."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

QUERY = "bert.encoder.layer.1.attention.self.query.weight"


def without(name: str) -> Callable[[Path], None]:
    def apply(checkpoint: Path) -> None:
        weights = load_file(checkpoint / "model.safetensors")
        del weights[name]
        save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})

    return apply


def with_array(name: str, array: np.ndarray) -> Callable[[Path], None]:
    def apply(checkpoint: Path) -> None:
        weights = load_file(checkpoint / "model.safetensors")
        save_file(weights | {name: array}, checkpoint / "model.safetensors", metadata={"format": "pt"})

    return apply


def cut(name: str) -> Callable[[Path], None]:
    def apply(checkpoint: Path) -> None:
        (checkpoint / name).write_bytes((checkpoint / name).read_bytes()[:-50])

    return apply


def change_json(name: str, **fields: object) -> Callable[[Path], None]:
    def apply(checkpoint: Path) -> None:
        contents = json.loads((checkpoint / name).read_text())
        (checkpoint / name).write_text(json.dumps(contents | fields))

    return apply
