"""Store a teacher's logits (soft labels) on disk, and compute the loss that trains a student on them.

Hinton et al. 2015: the student learns the label and the teacher's distribution at a temperature above 1, which also
says how wrong each wrong answer is. `training.teach` writes the logits once; students read them as often as needed.

A directory of logits has files ``logits-00000.safetensors`` and so on. Each contains the fp16 logits of some features;
its header names the features and the teacher. ``teacher.json`` is written last. All files are safetensors or JSON.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch.nn import functional

from training.checkpoints import save_json, save_tensors
from training.options import FEATURES_PER_FILE, DistillationArguments

TEACHER_FILE = "teacher.json"
Rows = NDArray[np.float16]


class UnsuitableLogits(ValueError):
    """The logits are damaged or belong to other features than this run's; the message says which."""


def fingerprint(features: Iterable[tuple[NDArray[np.int32], int]]) -> str:
    """Return the SHA-256 of a teacher's input: the tokens of each feature, and where its second text begins."""
    digest = hashlib.sha256()
    for input_ids, second in features:
        digest.update(np.array([len(input_ids), second], "<i8").tobytes())
        digest.update(input_ids.astype("<i4").tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Source:
    """The features that logits belong to; must be equal for the teacher and its students."""

    kind: str  # "squad", or the name of a GLUE task
    features: str  # `fingerprint` of the features
    rows: tuple[int, ...]  # number of logit rows of each feature
    settings: Mapping[str, object]  # the flags that decide the features, to report differences
    per_file: int = FEATURES_PER_FILE

    def shards(self) -> range:
        """Return the numbers of the files."""
        return range(-(-len(self.rows) // self.per_file))

    def of_shard(self, number: int) -> slice:
        """Return the features of a file."""
        return slice(number * self.per_file, min((number + 1) * self.per_file, len(self.rows)))


def save_shard(
    directory: Path, source: Source, teacher: str, number: int, logits: Sequence[NDArray[np.float32]]
) -> None:
    """Write the logits of one shard's features.

    Args:
        directory: output directory; created if missing.
        source: the features.
        teacher: SHA-256 of the teacher's weights.
        number: number of the shard.
        logits: logits of each of its features, (rows, columns).

    Raises:
        UnsuitableLogits: the logits are not finite in fp16.
        CheckpointError: the file cannot be written.
    """
    rows = np.concatenate(logits)
    if not (np.abs(rows) <= np.finfo(np.float16).max).all():
        raise UnsuitableLogits("the teacher gives logits that are NaN or too large for float16")
    tensor = torch.from_numpy(rows.astype(np.float16))
    save_tensors(_file(directory, number), {"logits": tensor}, _header(source, teacher) | {"sha256": _digest(tensor)})


def has_shard(directory: Path, source: Source, teacher: str, number: int) -> bool:
    """Check whether a shard is already written, so that a killed teacher can resume.

    Raises:
        UnsuitableLogits: the file is damaged, or belongs to other features or another teacher.
    """
    if not _file(directory, number).exists():
        return False
    _read(_file(directory, number), source, teacher)
    return True


def finish(directory: Path, source: Source, teacher: Mapping[str, object]) -> None:
    """Write ``teacher.json`` once all shards exist; ``teacher`` has at least the ``sha256`` of the weights."""
    described: dict[str, object] = {
        "kind": source.kind,
        "features": len(source.rows),
        "features_sha256": source.features,
    }
    described |= {"features_per_file": source.per_file}
    save_json(directory / TEACHER_FILE, described | {"settings": dict(source.settings), "teacher": dict(teacher)})


@dataclass(frozen=True, slots=True)
class TeacherLogits:
    """The logits of a run's features, in order and in memory: about 700 bytes for a SQuAD window."""

    teacher: str  # SHA-256 of the teacher's weights
    logits: Rows  # (rows of all features, columns)
    bounds: NDArray[np.int64]  # (features + 1,)

    @classmethod
    def read(cls, directory: Path, source: Source) -> "TeacherLogits":
        """Read a directory of logits.

        Raises:
            UnsuitableLogits: a file is missing or damaged, or the logits belong to other features than the run's.
        """
        path = directory / TEACHER_FILE
        try:
            described = json.loads(path.read_text())
            kind, features, settings = described["kind"], described["features_sha256"], dict(described["settings"])
            count, teacher = described["features"], str(described["teacher"]["sha256"])
            per_file = max(int(described["features_per_file"]), 1)
        except (OSError, ValueError, TypeError, LookupError) as error:
            raise UnsuitableLogits(f"{path} cannot be used ({error}); did training.teach finish?") from error
        if kind != source.kind:
            raise UnsuitableLogits(f"{path} is for {kind}, but this run is for {source.kind}")
        if features != source.features:
            raise UnsuitableLogits(f"{path} is for other features: {_difference(settings, count, source)}")
        source = replace(source, per_file=per_file)
        shards = [_read(_file(directory, number), source, teacher) for number in source.shards()]
        return cls(teacher, np.concatenate(shards), np.cumsum([0, *source.rows]))

    def __getitem__(self, index: int) -> Rows:
        """Return the logits of one feature, (rows, columns)."""
        return self.logits[self.bounds[index] : self.bounds[index + 1]]


def read_teacher(args: DistillationArguments, source: Source) -> TeacherLogits | None:
    """Load the logits that ``--teacher-logits`` names, or return None without that option.

    Raises:
        SystemExit: the logits are damaged or belong to other features than the run's.
    """
    if not args.teacher_logits:
        return None
    try:
        return TeacherLogits.read(args.teacher_logits, source)
    except UnsuitableLogits as error:
        raise SystemExit(f"--teacher-logits: {error}") from error


def distilled_identity(args: DistillationArguments, teacher: TeacherLogits | None) -> dict[str, object]:
    """Return the distillation settings that decide a step's result; empty without a teacher."""
    if not teacher:
        return {}
    return {"teacher": teacher.teacher, "temperature": args.temperature, "soft_share": args.soft_share}


def loss_terms(teacher: TeacherLogits | None, soft_share: float) -> dict[str, float]:
    """Return the names and weights of the loss terms."""
    return {"hard": 1 - soft_share, "soft": soft_share} if teacher else {"loss": 1.0}


def divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Compute the KL divergence from the teacher's distribution to the student's, times the temperature squared.

    The square keeps the gradient's size independent of the temperature (Hinton et al. 2015, section 2).

    Args:
        student: float32 logits, (…, classes).
        teacher: float32 logits of the same shape; positions that cannot be an answer are -1e9 in both.
        temperature: divisor of both logits.

    Returns:
        The sum over all distributions, a scalar.
    """
    of_student = functional.log_softmax(student / temperature, -1)
    of_teacher = functional.log_softmax(teacher / temperature, -1)
    return temperature**2 * functional.kl_div(of_student, of_teacher, reduction="sum", log_target=True)


def _difference(settings: Mapping[str, object], count: int, source: Source) -> str:
    """Describe how a student's features differ from those of the teacher."""
    ours = json.loads(json.dumps(dict(source.settings)))
    names = [name for name in sorted(settings.keys() | ours.keys()) if settings.get(name) != ours.get(name)]
    if names:
        flags = (f"--{name.replace('_', '-')} was {settings.get(name)}, is {ours.get(name)}" for name in names)
        return "; ".join(flags)
    if count != len(source.rows):
        return f"it has {count}, this run has {len(source.rows)}"
    return "the flags are the same, so the data or tokenizer.json differ"


def _file(directory: Path, number: int) -> Path:
    return directory / f"logits-{number:05}.safetensors"


def _header(source: Source, teacher: str) -> dict[str, str]:
    return {"features": source.features, "teacher": teacher}


def _read(path: Path, source: Source, teacher: str) -> Rows:
    try:
        with safe_open(path, framework="pt") as file:
            header, tensor = file.metadata() or {}, file.get_tensor("logits")
        number = int(path.stem.rpartition("-")[2])
    except (SafetensorError, OSError, ValueError) as error:
        raise UnsuitableLogits(f"{path} cannot be used ({error}); delete it and run training.teach again") from error
    for name, value in _header(source, teacher).items():
        if header.get(name) != value:
            raise UnsuitableLogits(f"{path} was written for other {name}; delete it, or give another directory")
    rows = sum(source.rows[source.of_shard(number)])
    if tensor.shape[0] != rows or tensor.dtype != torch.float16 or _digest(tensor) != header.get("sha256"):
        raise UnsuitableLogits(f"{path} is damaged; delete it and run training.teach again")
    logits: Rows = tensor.numpy()
    return logits


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
