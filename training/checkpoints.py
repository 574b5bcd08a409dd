"""Checkpoints on disk: the state to resume a run from, and the finished model.

Everything is safetensors and JSON; nothing is ever unpickled. Files are replaced atomically, so that a run killed while
it writes, or a full disk, costs no earlier checkpoint.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


class CheckpointError(ValueError):
    """A checkpoint file is corrupt or belongs to another run; the message names it."""


def save_state(path: Path, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer, run: str) -> None:
    """Write weights and optimizer moments after a step.

    Args:
        path: the file, replaced atomically.
        step: optimizer steps done.
        model: whose parameters are written, in their own dtype.
        optimizer: whose state tensors are written by parameter name.
        run: whatever must be equal for a resumed run to be the same run.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"model/{name}"] = parameter.detach().contiguous()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = torch.as_tensor(value).contiguous()
    save_tensors(path, tensors, {"step": str(step), "run": run})


def load_state(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, run: str) -> int:
    """Read what `save_state` wrote into a model and its optimizer; returns the steps done, 0 where there is no file.

    Raises:
        CheckpointError: the file is truncated or corrupt, or was written by a run with other settings.
    """
    if not path.exists():
        return 0
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            if metadata["run"] != run:
                raise CheckpointError(
                    f"{path}: was written by a run with other settings: {metadata['run']}, this one has {run}; "
                    "give another --output, or delete it"
                )
            names = list(file.keys())
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(file.get_tensor(f"model/{name}"))
                    optimizer.state[parameter] = {
                        key: file.get_tensor(entry)
                        for entry in names
                        for key, _, owner in [entry.partition("/")]
                        if owner == name and key != "model"
                    }
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path}: corrupt or of another model ({error}); delete it to start afresh") from error
    return int(metadata["step"])


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file in one step: whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(dict(tensors), partial, metadata=dict(metadata))
    os.replace(partial, path)


def save_json(path: Path, value: object) -> None:
    """Write a JSON file in one step."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    os.replace(partial, path)
