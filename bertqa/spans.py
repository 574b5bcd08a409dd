"""Windows + start and end logits -> ranked answers with exact character offsets.

Every pair (first token, last token) of every window of every document is one outcome, "no answer" is one more, and one
softmax runs over all of them: with s and e the logits, P(i, j) = exp(s_i + e_j) / Z as in Devlin et al. 2018, section
4.2, but with Z joined over windows and documents, so that scores lie in [0, 1] and compare across both. A span seen in
two overlapping windows counts once, with its better score. The null score is that of section 4.3 of the same paper,
s_[CLS] + e_[CLS], at its minimum over the windows: a text has no answer only if no window of it has one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from bertqa.graphemes import snap_to_graphemes
from bertqa.windows import Window, Windows

MAX_ANSWER_TOKENS = 30
"""Default length limit of an answer, in tokens (that of the original SQuAD scripts)."""

FloatArray = NDArray[np.float32]
Logits = tuple[FloatArray, FloatArray]
"""Start and end logits of one window, each float32 of shape (1, length)."""

_MASKED = np.float32(-np.inf)
_UNREAL = np.float32(1e30)  # no model's logit; the sum of two smaller ones cannot overflow


class InvalidLogits(ValueError):
    """The engine's output is not usable: NaN, infinite, absurdly large, or of another shape than its window."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A span of a context; ``context[start:end] == text`` always holds."""

    text: str
    score: float  # probability in [0, 1], joint over all windows and documents
    start: int  # first code point
    end: int  # one past the last code point
    context_index: int  # which of the documents


@dataclass(frozen=True, slots=True)
class WindowSpan:
    """The best span of one window alone, for explanations; its bounds are code points of its context."""

    context_index: int
    first_token: int
    tokens: int
    start: int
    end: int
    logit: float  # start logit + end logit of the span
    null_logit: float  # start logit + end logit of [CLS]


@dataclass(frozen=True, slots=True)
class Decoded:
    """Ranked answers of one question, and what speaks against there being one."""

    answers: tuple[Answer, ...]
    has_answer: bool
    null_score: float  # probability of "no answer" in [0, 1]; 1.0 when the documents hold no token
    null_margin: float  # null logit minus the best span's logit; compared with the threshold

    @property
    def best(self) -> Answer | None:
        """The first answer, or None where the documents hold no token."""
        return self.answers[0] if self.answers else None


def decode(
    documents: Sequence[Windows],
    logits: Sequence[Sequence[Logits]],
    *,
    top_k: int = 1,
    max_answer_tokens: int = MAX_ANSWER_TOKENS,
    null_threshold: float = 0.0,
    align_to_words: bool = True,
) -> Decoded:
    """Rank the spans of one question over its documents.

    Args:
        documents: windows of the question over each context.
        logits: for each document, start and end logits of each of its windows, float32 of shape (1, length).
        top_k: number of distinct spans wanted; fewer come back only where the documents hold fewer. The first k
            answers of a larger ``top_k`` are the answers of k.
        max_answer_tokens: longest span considered, in tokens, before it is widened to words and graphemes.
        null_threshold: ``has_answer`` holds while null logit - best logit is not above it.
        align_to_words: widen spans to whole words, so that none starts or ends inside one.

    Raises:
        InvalidLogits: a logit is NaN, infinite or above 1e30, or a shape differs from its window's.
        ValueError: ``top_k`` or ``max_answer_tokens`` is below 1.
    """
    if top_k < 1:
        raise ValueError(f"top_k: must be at least 1; got {top_k}")
    if max_answer_tokens < 1:
        raise ValueError(f"max_answer_tokens: must be at least 1; got {max_answer_tokens}")

    bands = [_band(windows, rows, max_answer_tokens) for windows, rows in zip(documents, logits, strict=True)]
    nulls = [_null(*pair) for rows in logits for pair in rows]
    flat = np.concatenate([band.ravel() for band in bands]) if bands else np.empty(0, np.float32)
    best = float(flat.max()) if flat.size else -np.inf
    if not nulls or not np.isfinite(best):
        return Decoded((), has_answer=False, null_score=1.0, null_margin=np.inf)
    null = min(nulls)

    highest = max(best, null)
    normaliser = float(np.exp(flat - np.float32(highest)).sum(dtype=np.float64)) + float(np.exp(null - highest))
    bounds = np.cumsum([0, *(band.size for band in bands)])
    answers: dict[tuple[int, int, int], Answer] = {}
    for index in _ranked(flat, top_k):
        document = int(np.searchsorted(bounds, index, side="right")) - 1
        first, extra = divmod(int(index - bounds[document]), max_answer_tokens)
        windows = documents[document]
        start, end = _characters(windows, first, first + extra, align_to_words)
        if (document, start, end) not in answers:
            score = min(float(np.exp(float(flat[index]) - highest)) / normaliser, 1.0)
            answers[document, start, end] = Answer(windows.context[start:end], score, start, end, document)
            if len(answers) == top_k:
                break
    return Decoded(
        answers=tuple(answers.values()),
        has_answer=null - best <= null_threshold,
        null_score=min(float(np.exp(null - highest)) / normaliser, 1.0),
        null_margin=null - best,
    )


def best_of_each_window(
    documents: Sequence[Windows],
    logits: Sequence[Sequence[Logits]],
    *,
    max_answer_tokens: int = MAX_ANSWER_TOKENS,
) -> Iterator[WindowSpan]:
    """Each window's own best span and null logit, in order; arguments and errors as in `decode`."""
    for number, (windows, rows) in enumerate(zip(documents, logits, strict=True)):
        for window, pair in zip(windows.windows, rows, strict=True):
            sums = _window_band(window, pair, max_answer_tokens)
            first, extra = divmod(int(sums.argmax()), max_answer_tokens)
            start, end = _characters(windows, window.first_token + first, window.first_token + first + extra, False)
            yield WindowSpan(
                context_index=number,
                first_token=window.first_token,
                tokens=window.tokens,
                start=start,
                end=end,
                logit=float(sums.max()),
                null_logit=_null(*pair),
            )


def _band(windows: Windows, rows: Sequence[Logits], max_answer_tokens: int) -> FloatArray:
    """Logit of each span of a document: row i, column d is the span of tokens i to i + d; -inf where no window has it.

    Returns float32 of shape (context tokens, max_answer_tokens).
    """
    if len(windows.windows) == 1:
        return _window_band(windows.windows[0], rows[0], max_answer_tokens)
    band = np.full((len(windows.starts), max_answer_tokens), _MASKED, dtype=np.float32)
    for window, pair in zip(windows.windows, rows, strict=True):
        part = band[window.first_token : window.first_token + window.tokens]
        np.maximum(part, _window_band(window, pair, max_answer_tokens), out=part)
    return band


def _window_band(window: Window, pair: Logits, max_answer_tokens: int) -> FloatArray:
    """The same for one window: float32 of shape (window.tokens, max_answer_tokens)."""
    for name, values in zip(("start_logits", "end_logits"), pair, strict=True):
        if values.shape != window.input_ids.shape:
            raise InvalidLogits(f"{name}: shape {values.shape}, but the window has {window.input_ids.shape}")
        if not are_real(values):
            raise InvalidLogits(f"{name}: NaN, infinite or absurdly large for a window of {window.length} tokens")
    context = slice(window.offset, window.offset + window.tokens)
    ends = np.full(window.tokens + max_answer_tokens - 1, _MASKED, dtype=np.float32)
    ends[: window.tokens] = pair[1][0, context]
    sums: FloatArray = pair[0][0, context, None] + sliding_window_view(ends, max_answer_tokens)
    return sums


def are_real(values: FloatArray) -> bool:
    """Whether a model can have meant these logits: none is NaN, infinite, or of an absurd size."""
    return bool((np.abs(values) < _UNREAL).all())  # false for NaN too


def _null(start_logits: FloatArray, end_logits: FloatArray) -> float:
    return float(start_logits[0, 0]) + float(end_logits[0, 0])


def _ranked(flat: FloatArray, wanted: int) -> Iterator[int]:
    """Indexes of the finite values, highest first, ties by index; sorts no more of them than are asked for."""
    yield int(flat.argmax())  # most often all that is asked for
    finite = int(np.isfinite(flat).sum())
    taken, size = 1, 4 * wanted
    while taken < finite:
        size = min(size, finite)
        # Everything not below the size-th value, so that ties at the cut do not depend on ``wanted``.
        cut = np.partition(flat, flat.size - size)[flat.size - size]
        candidates = np.flatnonzero(flat >= cut)
        order = candidates[np.argsort(-flat[candidates], kind="stable")]
        yield from order[taken:].tolist()
        taken, size = len(order), size * 4


def _characters(windows: Windows, first: int, last: int, align_to_words: bool) -> tuple[int, int]:
    """Code points of the tokens first to last, widened to whole graphemes and, if asked for, to whole words."""
    if align_to_words:
        words = windows.words
        while first > 0 and words[first - 1] == words[first]:
            first -= 1
        while last + 1 < len(words) and words[last + 1] == words[last]:
            last += 1
    return snap_to_graphemes(windows.context, int(windows.starts[first]), int(windows.ends[last]))
