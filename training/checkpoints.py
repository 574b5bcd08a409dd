"""Checkpoints on disk: the state to resume a run from, and the finished model.

Everything is safetensors and JSON; nothing is ever unpickled. A file is written beside its place, flushed to the disk
and then renamed, so that a run killed while it writes, or a full disk, costs no earlier checkpoint. Of a run's state
two generations are kept, and each carries a SHA-256 of its contents: a flipped bit is named and not trained on.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

STATE_FILE = "resume.safetensors"
PREVIOUS_STATE_FILE = "resume.previous.safetensors"

Tensors = dict[str, torch.Tensor]


class CheckpointError(ValueError):
    """A checkpoint file is corrupt, of another run, or cannot be written; the message names it and what to do."""


@dataclass(frozen=True, slots=True)
class State:
    """A run between two steps."""

    step: int  # optimizer steps done
    tensors: Tensors  # as `collect` names them
    scaler: Mapping[str, float]  # of the dynamic loss scale; empty without one


def collect(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    """The tensors of a run by name, not copied: ``model/<parameter>`` and ``<moment>/<parameter>``."""
    tensors: Tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"model/{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = torch.as_tensor(value)
    return tensors


def restore(model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put what `collect` gave back into a model and its optimizer.

    Raises:
        CheckpointError: a parameter is missing, or a tensor is of another shape or of no parameter.
    """
    parameters = dict(model.named_parameters())
    moments: dict[str, Tensors] = {name: {} for name in parameters}
    if missing := [name for name in parameters if f"model/{name}" not in tensors]:
        raise CheckpointError(f"holds no parameter {missing[0]!r}")
    with torch.no_grad():
        for entry, tensor in tensors.items():
            kind, _, name = entry.partition("/")
            if name not in parameters:
                raise CheckpointError(f"holds {entry!r}, which this model has not")
            parameter = parameters[name]
            if kind == "model":
                if tensor.shape != parameter.shape:
                    raise CheckpointError(f"{name!r} is {tuple(tensor.shape)}, in this model {tuple(parameter.shape)}")
                parameter.copy_(tensor)
            else:
                moments[name][kind] = tensor.to(parameter.device, copy=True)
    for name, state in moments.items():
        if state:
            optimizer.state[parameters[name]] = state


def save_state(directory: Path, state: State, run: Mapping[str, object]) -> None:
    """Write a run's state; the one written before becomes the previous generation.

    Args:
        directory: of the run's output.
        state: what is written; tensors may be on any device.
        run: whatever must be equal for a resumed run to be the same run.

    Raises:
        CheckpointError: it cannot be written, the disk is full for example; the earlier states are as they were.
    """
    # Names, types and shapes are in the digest too, and so are the numbers beside the tensors.
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(state.tensors.items())}
    record = {"step": state.step, "scaler": dict(state.scaler), "run": dict(run)}
    metadata = {"record": json.dumps(record, sort_keys=True)}
    newest = directory / STATE_FILE
    _write(newest, tensors, metadata | {"sha256": digest_of(tensors, metadata["record"])}, keep=PREVIOUS_STATE_FILE)


def load_state(directory: Path, run: Mapping[str, object]) -> State | None:
    """Read the newest state of a run, None where it has none yet.

    Raises:
        CheckpointError: the file is truncated or corrupt, or was written by a run with other settings.
    """
    newest, previous = directory / STATE_FILE, directory / PREVIOUS_STATE_FILE
    if not newest.exists():
        # A run that was killed between the two renames of `save_state` has only this one.
        return _read(previous, run, "delete it to start afresh") if previous.exists() else None
    remedy = "delete it to start afresh"
    if previous.exists():
        try:
            remedy = f"delete it to resume from step {_read(previous, run, '').step} of {previous.name}"
        except CheckpointError:
            remedy = f"{previous.name} is no better; delete both to start afresh"
    return _read(newest, run, remedy)


def _read(path: Path, run: Mapping[str, object], remedy: str) -> State:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        record = json.loads(metadata["record"])
        written, step, scaler = record["run"], record["step"], record["scaler"]
        expected = metadata["sha256"]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: corrupt or truncated ({error}); {remedy}") from error
    if digest_of(tensors, metadata["record"]) != expected:
        raise CheckpointError(f"{path}: corrupt, its contents have another SHA-256 than its header says; {remedy}")
    now = json.loads(json.dumps(dict(run)))  # tuples become lists
    if written != now:
        differing = [name for name in sorted(written.keys() | now.keys()) if written.get(name) != now.get(name)]
        changes = ", ".join(f"{name} {written.get(name)!r}, now {now.get(name)!r}" for name in differing)
        raise CheckpointError(
            f"{path}: was written by a run with other settings ({changes}); give another --output, or delete it"
        )
    return State(step, tensors, scaler)


def digest_of(tensors: Mapping[str, torch.Tensor], record: str) -> str:
    """SHA-256 of a text and of tensors, by name, type, shape and value, in the order given."""
    digest = hashlib.sha256(record.encode())
    for name, tensor in tensors.items():
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)  # numpy has no bfloat16
    return digest.hexdigest()


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file in one step: whole, or not at all.

    Raises:
        CheckpointError: it cannot be written; an earlier file of the name is as it was.
    """
    _write(path, tensors, metadata)


def save_json(path: Path, value: object) -> None:
    """Write a JSON file in one step."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    os.replace(partial, path)


def _write(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], *, keep: str | None = None
) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), partial, metadata=dict(metadata))
        _flush(partial)
    except (SafetensorError, OSError) as error:  # safetensors wraps the errors of the file system
        with contextlib.suppress(OSError):
            partial.unlink()
        raise CheckpointError(f"{path}: cannot be written ({error}); what was saved before is untouched") from error
    if keep and path.exists():
        os.replace(path, path.with_name(keep))
    os.replace(partial, path)
    _flush(path.parent)  # the renames themselves


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
