"""Write and read checkpoints: the state to resume a run from, and the finished model.

All files are safetensors or JSON; nothing is unpickled. Each file is written under a temporary name, flushed to disk
and renamed, so that a killed run or a full disk never damages an earlier checkpoint. Two generations of a run's state
are kept. Each has a SHA-256 of its contents, so that a flipped bit is reported instead of trained on.
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
    """A checkpoint file is corrupt, belongs to another run or cannot be written; the message says how to fix it."""


@dataclass(frozen=True, slots=True)
class State:
    """The state of a run between two steps."""

    step: int  # optimizer steps done
    tensors: Tensors  # named as by `collect`
    scaler: Mapping[str, float]  # state of the dynamic loss scale; empty without one


def collect(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    """Return the tensors of a run by name, without copying: ``model/<parameter>`` and ``<moment>/<parameter>``."""
    tensors: Tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"model/{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = torch.as_tensor(value)
    return tensors


def restore(model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Restore the tensors of `collect` into a model and its optimizer.

    Raises:
        CheckpointError: a parameter is missing, or a tensor is unknown or has another shape.
    """
    parameters = dict(model.named_parameters())
    moments: dict[str, Tensors] = {name: {} for name in parameters}
    if missing := [name for name in parameters if f"model/{name}" not in tensors]:
        raise CheckpointError(f"has no parameter {missing[0]!r}")
    with torch.no_grad():
        for entry, tensor in tensors.items():
            kind, _, name = entry.partition("/")
            if name not in parameters:
                raise CheckpointError(f"has {entry!r}, which this model does not have")
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
    """Write a run's state; the state written before becomes the previous generation.

    Args:
        directory: output directory of the run.
        state: the state to write; tensors may be on any device.
        run: settings that must be equal when the run is resumed.

    Raises:
        CheckpointError: the state cannot be written, e.g. because the disk is full; earlier states are unchanged.
    """
    # The digest also covers names, types, shapes, and the numbers stored with the tensors.
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(state.tensors.items())}
    record = {"step": state.step, "scaler": dict(state.scaler), "run": dict(run)}
    metadata = {"record": json.dumps(record, sort_keys=True)}
    newest = directory / STATE_FILE
    _write(newest, tensors, metadata | {"sha256": digest_of(tensors, metadata["record"])}, keep=PREVIOUS_STATE_FILE)


def load_state(directory: Path, run: Mapping[str, object]) -> State | None:
    """Read the newest state of a run, or return None if it has none yet.

    Raises:
        CheckpointError: the file is truncated or corrupt, or was written by a run with other settings.
    """
    newest, previous = directory / STATE_FILE, directory / PREVIOUS_STATE_FILE
    if not newest.exists():
        # A run killed between the two renames of `save_state` has only the previous generation.
        return _read(previous, run, "delete it to start afresh") if previous.exists() else None
    remedy = "delete it to start afresh"
    if previous.exists():
        try:
            remedy = f"delete it to resume from step {_read(previous, run, '').step} of {previous.name}"
        except CheckpointError:
            remedy = f"{previous.name} cannot be used either; delete both to start afresh"
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
        raise CheckpointError(f"{path}: corrupt, the SHA-256 of its contents is not the one in its header; {remedy}")
    now = json.loads(json.dumps(dict(run)))  # tuples become lists
    if written != now:
        differing = [name for name in sorted(written.keys() | now.keys()) if written.get(name) != now.get(name)]
        changes = ", ".join(f"{name} {written.get(name)!r}, now {now.get(name)!r}" for name in differing)
        raise CheckpointError(
            f"{path}: was written by a run with other settings ({changes}); give another --output or delete the file"
        )
    return State(step, tensors, scaler)


def digest_of(tensors: Mapping[str, torch.Tensor], record: str) -> str:
    """Return the SHA-256 of a text and of the name, type, shape and values of tensors, in the given order."""
    digest = hashlib.sha256(record.encode())
    for name, tensor in tensors.items():
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)  # numpy has no bfloat16
    return digest.hexdigest()


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically.

    Raises:
        CheckpointError: the file cannot be written; an existing file is unchanged.
    """
    _write(path, tensors, metadata)


def save_json(path: Path, value: object) -> None:
    """Write a JSON file atomically."""
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
    except (SafetensorError, OSError) as error:  # safetensors wraps file system errors
        with contextlib.suppress(OSError):
            partial.unlink()
        raise CheckpointError(f"{path}: cannot be written ({error}); earlier checkpoints are unchanged") from error
    if keep and path.exists():
        os.replace(path, path.with_name(keep))
    os.replace(partial, path)
    _flush(path.parent)  # makes the renames durable


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
