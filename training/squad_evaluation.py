"""Answer the questions of a SQuAD file with a torch model, in batches, and report by the official rules."""

from collections import defaultdict
from collections.abc import Callable, Container, Sequence
from dataclasses import asdict

import numpy as np
import torch
from transformers import PreTrainedModel

from bertqa.spans import Decoded, Logits, decode
from bertqa.squad import Example, exact_match, f1, score, score_by_kind
from bertqa.windows import Window, WindowTokenizer
from training.distributed import Workers
from training.inference import predict
from training.options import Precision
from training.squad_data import has_impossible
from training.squad_features import Feature, collate

QUESTIONS_AT_ONCE = 1024
"""Questions whose windows are sorted by length together."""

Predict = Callable[[Sequence[Window]], list[Logits]]
"""Runs a model on windows; start and end logits of each, float32 of shape (1, length)."""


def span_logits(output: object) -> torch.Tensor:
    """Return the start and end logits of a model's output, (windows, length, 2)."""
    return torch.stack((output.start_logits, output.end_logits), -1)  # type: ignore[attr-defined]


def predictor(model: PreTrainedModel, device: torch.device, precision: Precision, *, progress: bool = False) -> Predict:
    """Turn the model into a function of windows; padding gets logits of 0."""

    def run(windows: Sequence[Window]) -> list[Logits]:
        features = []
        for window in windows:
            tokens = window.offset + window.tokens + 1
            features.append(Feature(window.input_ids[0, :tokens], window.offset, 0, 0))
        rows = predict(
            model, features, collate, span_logits, device, precision, progress="window" if progress else None
        )
        found = []
        for window, logits in zip(windows, rows, strict=True):
            padded = np.zeros((2, 1, window.length), np.float32)
            padded[:, 0, : len(logits)] = logits.T
            found.append((padded[0], padded[1]))
        return found

    return run


def evaluate(
    examples: Sequence[Example], tokenizer: WindowTokenizer, predict: Predict, workers: Workers
) -> list[tuple[Example, Decoded]]:
    """Answer the questions; each process computes a share, and every process gets all answers."""
    mine = list(examples)[workers.rank :: workers.size]
    answers: list[tuple[Example, Decoded]] = []
    for begin in range(0, len(mine), QUESTIONS_AT_ONCE):
        part = mine[begin : begin + QUESTIONS_AT_ONCE]
        windows = [tokenizer(example.question, example.context) for example in part]
        logits = iter(predict([window for each in windows for window in each.windows]))
        for example, each in zip(part, windows, strict=True):
            answers.append((example, decode([each], [[next(logits) for _ in each.windows]])))
    return [pair for share in workers.gather(answers) for pair in share]


def as_report(answered: Sequence[tuple[Example, Decoded]], null_threshold: float) -> dict[str, float]:
    """Compute EM and F1 of the answers by the official rules.

    For SQuAD v1.1, the best spans are scored and "no answer" is not allowed. For v2.0, the report has everything that
    the official script prints, with "no answer" above the threshold; ``best_exact`` and ``best_f1`` use the thresholds
    that are best for these questions.
    """
    examples = [example for example, _ in answered]
    if not has_impossible(examples):
        return asdict(score(examples, {example.id: _text(decoded) for example, decoded in answered}))
    given = ((example, decoded, decoded.null_margin <= null_threshold) for example, decoded in answered)
    report = score_by_kind(examples, {example.id: _text(decoded) if has else "" for example, decoded, has in given})
    for name, measure in (("exact", exact_match), ("f1", f1)):
        report[f"best_{name}_thresh"], report[f"best_{name}"] = fit_null_threshold(answered, measure)
    return report


def fit_null_threshold(
    answered: Sequence[tuple[Example, Decoded]], measure: Callable[[str, str], float] = f1
) -> tuple[float, float]:
    """Find the threshold with the best mean score over all questions; return it with that score in percent.

    This is the search of ``find_best_thresh`` in the official SQuAD v2.0 script: below its margin a question scores the
    ``measure`` of its best span; above, 1 if it is unanswerable, else 0.
    """
    margins = np.array([decoded.null_margin for _, decoded in answered])
    gains = np.array(
        [
            max(measure(_text(decoded), reference.text) for reference in example.references)
            if example.references
            else -1.0  # lost once the threshold lets the question be answered
            for example, decoded in answered
        ]
    )
    order = np.argsort(margins)
    unanswerable = sum(not example.references for example, _ in answered)
    totals = unanswerable + np.concatenate([[0.0], np.cumsum(gains[order])])
    edges = np.concatenate([[margins[order[0]] - 1.0], margins[order], [margins[order[-1]] + 1.0]])
    best = int(np.where(np.diff(edges) > 0, totals, -np.inf).argmax())  # there is no threshold between equal margins
    return float((edges[best] + edges[best + 1]) / 2), float(100 * totals[best] / len(answered))


def has_answer_shares(
    answered: Sequence[tuple[Example, Decoded]], null_threshold: float, hard: Container[str]
) -> dict[str, dict[str, float]]:
    """Count each kind of question, and compute for how many percent ``has_answer`` is right at a threshold.

    Args:
        answered: the questions with their answers.
        null_threshold: threshold for `decode`.
        hard: ids of the questions from `training.hard_negatives`.
    """
    right: dict[str, list[bool]] = defaultdict(list)
    for example, decoded in answered:
        kind = "answerable" if example.references else "exchanged" if example.id in hard else "unanswerable"
        right[kind].append((decoded.null_margin <= null_threshold) == bool(example.references))
    return {kind: {"right": 100 * float(np.mean(each)), "total": len(each)} for kind, each in right.items()}


def _text(decoded: Decoded) -> str:
    return decoded.best.text if decoded.best else ""
