"""Average the weights of checkpoints: a *model soup* (Wortsman et al. 2022).

Runs that fine-tune the same encoder, or continue one another, end in the same valley of the loss. The mean of their
weights often answers better than each of them, and is as fast, because it is a checkpoint of the same size. Measure it,
fit its null threshold and complete it with ``python -m training.finetune_squad --epochs 0 --init DIR``.
"""

if __name__ == "__main__":  # before the slow imports, which --help does not need
    from bertqa.cli.command import run
    from training.commands import average_app

    run(average_app, "python -m training.average")

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig

from bertqa.manifest import TOKENIZER_FILE, WEIGHTS_FILE
from training.checkpoints import CheckpointError, Tensors
from training.encoders import CONFIG_FILE, write_checkpoint
from training.options import AverageArguments

FUNCTION = ("num_attention_heads", "hidden_act", "layer_norm_eps")
"""Config fields that must be equal, as well as the shapes of the weights, before weights can be averaged."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The files of one checkpoint."""

    directory: Path
    config: dict[str, Any]
    architecture: str  # class name of the model in transformers
    tokenizer: str
    weights: Tensors

    @classmethod
    def read(cls, directory: Path) -> "Checkpoint":
        """Read a checkpoint directory.

        Raises:
            SystemExit: a file is missing or corrupt.
        """
        name = CONFIG_FILE
        try:
            config = json.loads((directory / CONFIG_FILE).read_text())
            architecture = str(config["architectures"][0])
            name = TOKENIZER_FILE
            tokenizer = (directory / TOKENIZER_FILE).read_text()
            json.loads(tokenizer)
            name = WEIGHTS_FILE
            return cls(directory, config, architecture, tokenizer, load_file(directory / WEIGHTS_FILE))
        except (OSError, ValueError, TypeError, LookupError, SafetensorError) as error:
            raise SystemExit(f"{directory}: {name} cannot be used ({error})") from error

    def refuse_unlike(self, other: "Checkpoint") -> None:
        """End the job if ``other`` is not a checkpoint of the same model; the message names the difference."""
        if self.architecture != other.architecture:
            raise SystemExit(f"{other.directory} is a {other.architecture}, {self.directory} a {self.architecture}")
        for name in FUNCTION:
            if (ours := self.config.get(name)) != (theirs := other.config.get(name)):
                raise SystemExit(f"{other.directory}: {CONFIG_FILE}: {name} is {theirs}, in {self.directory} {ours}")
        if json.loads(self.tokenizer) != json.loads(other.tokenizer):
            raise SystemExit(f"{other.directory}: {TOKENIZER_FILE} differs from that of {self.directory}")
        ours, theirs = ({name: tuple(x.shape) for name, x in c.weights.items()} for c in (self, other))
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                shapes = f"{theirs.get(name)}, in {self.directory} {ours.get(name)}"
                raise SystemExit(f"{other.directory}: {WEIGHTS_FILE}: the shape of {name} is {shapes}")


def main(args: AverageArguments) -> None:
    """Check that all checkpoints are of the same model, average them, and write the result."""
    first, *others = (Checkpoint.read(directory) for directory in args.checkpoints)
    for other in others:
        first.refuse_unlike(other)
    weights = mean([first.weights, *(other.weights for other in others)], args.weights)
    config = AutoConfig.for_model(**{"model_type": "bert"} | first.config)
    try:
        write_checkpoint(args.output, first.architecture, config, weights, first.tokenizer)
    except (OSError, CheckpointError) as error:
        raise SystemExit(f"--output: {error}") from error


def mean(weights: Sequence[Tensors], shares: Sequence[float]) -> Tensors:
    """Compute the weighted mean of tensors with the same names and shapes, in float32, whatever their stored dtype.

    Args:
        weights: tensors of each checkpoint.
        shares: weight of each checkpoint; they need not sum to 1.
    """
    parts = [share / sum(shares) for share in shares]
    return {
        name: torch.stack([part * each[name].float() for part, each in zip(parts, weights, strict=True)]).sum(0)
        for name in weights[0]
    }
