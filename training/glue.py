"""The GLUE tasks: their files, labels, metrics and submissions (Wang et al. 2019, arXiv 1804.07461).

Files have the format of the benchmark's archives: tab-separated, with quotes as plain characters. WNLI and the
diagnostic set are left out, as in Devlin et al. 2018.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

HIGHEST_SCORE = 5.0
"""STS-B's score of two sentences with the same meaning; the lowest score is 0."""

_BINARY = ("0", "1")
_ENTAILMENT = ("entailment", "not_entailment")

Array = NDArray[np.float64]


class GlueError(ValueError):
    """A file does not have the format of the task's archive; the message names file and line."""


@dataclass(frozen=True, slots=True)
class GlueTask:
    """The columns and labels of a task's files, and its metrics."""

    name: str  # also the name of its folder
    texts: tuple[str, ...]  # columns of the one or two texts
    label: str  # column of the label
    labels: tuple[str, ...]  # labels in the files, in order of the classes; empty if the label is a score
    metrics: tuple[str, ...]  # the official metrics, keys of `METRICS`
    header: tuple[str, ...] = ()  # columns of training and development sets without a header line
    sections: Mapping[str, str] = field(default_factory=lambda: {"": ""})
    """File name suffix of each development or test set, and of its submission."""


TASKS: Mapping[str, GlueTask] = MappingProxyType(
    {
        task.name: task
        for task in (
            GlueTask(
                *("CoLA", ("sentence",), "label", _BINARY, ("matthews",)),
                header=("source", "label", "mark", "sentence"),
            ),
            GlueTask("SST-2", ("sentence",), "label", _BINARY, ("accuracy",)),
            GlueTask("MRPC", ("#1 String", "#2 String"), "Quality", _BINARY, ("f1", "accuracy")),
            GlueTask("STS-B", ("sentence1", "sentence2"), "score", (), ("pearson", "spearman")),
            GlueTask("QQP", ("question1", "question2"), "is_duplicate", _BINARY, ("f1", "accuracy")),
            GlueTask(
                *("MNLI", ("sentence1", "sentence2"), "gold_label"),
                *(("entailment", "neutral", "contradiction"), ("accuracy",)),
                sections=MappingProxyType({"_matched": "-m", "_mismatched": "-mm"}),
            ),
            GlueTask("QNLI", ("question", "sentence"), "label", _ENTAILMENT, ("accuracy",)),
            GlueTask("RTE", ("sentence1", "sentence2"), "label", _ENTAILMENT, ("accuracy",)),
        )
    }
)


@dataclass(frozen=True, slots=True)
class Example:
    """A line of a task's file."""

    index: int  # position in the file, from 0, or the index stated in a test set
    texts: tuple[str, ...]
    label: int | float | None  # the class or the score; None in a test set


def read_glue(path: Path, task: GlueTask, *, labelled: bool = True) -> list[Example]:
    """Read a training or development set, or, with ``labelled`` false, a test set.

    Raises:
        GlueError: the file is missing or empty, or a line has the wrong number of fields, an unknown label, or bytes
            that are not UTF-8.
    """
    examples: list[Example] = []
    columns = list(task.header) if labelled else []
    try:
        with path.open("rb") as file:  # binary, so that only \n ends a line
            for number, line in enumerate(file, 1):
                fields = _fields(line, f"{path}:{number}")
                if not columns:
                    columns = fields
                    missing = {*task.texts, *([task.label] if labelled else [])} - {*columns}
                    if missing:
                        raise GlueError(f"{path}:1: {task.name} has a column {min(missing)!r}, not only {columns}")
                    continue
                if len(fields) != len(columns):
                    raise GlueError(f"{path}:{number}: {len(fields)} fields, but {len(columns)} columns: {columns}")
                row = dict(zip(columns, fields, strict=True))
                label = _label(row[task.label], task, f"{path}:{number}") if labelled else None
                index = row.get("index", row.get("id", "")) if not labelled else ""
                if index and not index.isdecimal():
                    raise GlueError(f"{path}:{number}: the index is {index[:40]!r}, not a number")
                examples.append(Example(int(index or len(examples)), tuple(row[name] for name in task.texts), label))
    except OSError as error:
        raise GlueError(f"{path}: {error.strerror}") from error
    if not examples:
        raise GlueError(f"{path}: contains no examples")
    return examples


def _fields(line: bytes, place: str) -> list[str]:
    try:
        return line.decode("utf-8-sig").rstrip("\r\n").split("\t")
    except UnicodeDecodeError as error:
        raise GlueError(f"{place}: byte {error.start + 1} is not UTF-8") from error


def _label(text: str, task: GlueTask, place: str) -> int | float:
    if task.labels:
        if text not in task.labels:
            raise GlueError(f"{place}: the label is {text[:40]!r}, not one of {', '.join(task.labels)}")
        return task.labels.index(text)
    try:
        score = float(text)
    except ValueError:
        score = -1.0
    if not 0 <= score <= HIGHEST_SCORE:
        raise GlueError(f"{place}: the score is {text[:40]!r}, not a number from 0 to {HIGHEST_SCORE:g}")
    return score


def predictions(task: GlueTask, logits: NDArray[np.float32]) -> Array:
    """Return the most likely classes, or the scores clipped to their range; logits are (examples, classes or 1)."""
    found = logits.argmax(axis=1) if task.labels else logits[:, 0].clip(0, HIGHEST_SCORE)
    return found.astype(np.float64)


def score(task: GlueTask, predicted: Array, expected: Array) -> dict[str, float]:
    """Compute the official metrics of a task, in percent; both arrays have the format of `predictions`."""
    return {name: 100 * METRICS[name](predicted, expected) for name in task.metrics}


def write_submission(path: Path, task: GlueTask, examples: Sequence[Example], predicted: Array) -> None:
    """Write the predictions for a test set in the format of the benchmark's server."""
    lines = ["index\tprediction"]
    for example, value in zip(examples, predicted, strict=True):
        lines.append(f"{example.index}\t{task.labels[int(value)] if task.labels else f'{value:.3f}'}")
    path.write_text("\n".join(lines) + "\n")


def accuracy(predicted: Array, expected: Array) -> float:
    """Compute the share of correct predictions."""
    return float((predicted == expected).mean())


def f1(predicted: Array, expected: Array) -> float:
    """Compute F1 of class 1: 2 TP / (2 TP + FP + FN), or 0 if class 1 is neither predicted nor expected."""
    both, either = (predicted * expected).sum(), (predicted + expected).sum()
    return float(2 * both / either) if either else 0.0


def pearson(predicted: Array, expected: Array) -> float:
    """Compute Pearson's correlation, or 0 if one side is constant, where it is undefined."""
    if np.ptp(predicted) == 0 or np.ptp(expected) == 0:
        return 0.0
    return float(np.corrcoef(predicted, expected)[0, 1])


def spearman(predicted: Array, expected: Array) -> float:
    """Compute Spearman's correlation: Pearson's correlation of the ranks, with mean ranks for ties."""
    return pearson(_ranks(predicted), _ranks(expected))


def _ranks(values: Array) -> Array:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Array = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return ranks


METRICS: Mapping[str, Callable[[Array, Array], float]] = MappingProxyType(
    {
        "accuracy": accuracy,
        "f1": f1,
        "matthews": pearson,  # equal for two classes: Matthews 1975 defines it as the correlation of 0 and 1
        "pearson": pearson,
        "spearman": spearman,
    }
)
