"""Windows + start and end logits -> ranked answers with exact character offsets.

Every pair (first token, last token) of every window of every document is one outcome, "no answer" is one more, and one
softmax runs over all of them: with s and e the logits, P(i, j) = exp(s_i + e_j) / Z as in Devlin et al. 2018, section
4.2, but with Z joined over windows and documents, so that scores lie in [0, 1] and compare across both. A span seen in
two overlapping windows counts once, with its better score. The null score is that of section 4.3 of the same paper,
s_[CLS] + e_[CLS], at its minimum over the windows: a text has no answer only if no window of it has one.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bertqa.errors import InvalidArgument
from bertqa.graphemes import widen_to_graphemes
from bertqa.windows import IntArray, Window, Windows

MAX_ANSWER_TOKENS = 30
"""Default length limit of an answer, in tokens (that of the original SQuAD scripts)."""

FloatArray = NDArray[np.float32]
Logits = tuple[FloatArray, FloatArray]
"""Start and end logits of one window, each float32 of shape (1, length)."""

_BLOCK = 1 << 18  # spans weighed at once: a few milliseconds of work, and up to 64 bytes of memory each
_FEW = 64  # spans that Python compares faster than NumPy
_MASKED = np.float32(-np.inf)
_UNREAL = float(np.float32(1e30))  # no model's logit; the sum of two smaller ones cannot overflow


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
    max_answer_chars: int | None = None,
    check: Callable[[], None] = lambda: None,
) -> Decoded:
    """Rank the spans of one question over its documents.

    Time is linear in the characters and in tokens x ``max_answer_tokens``, for any text. Memory does not grow with
    ``max_answer_tokens``: 16,000,000 spans of 40,000 tokens peak at 5 MB, or 13 MB if they all widen to a few spans.

    Args:
        documents: windows of the question over each context.
        logits: for each document, start and end logits of each of its windows, float32 of shape (1, length).
        top_k: number of distinct spans; there are fewer only if the documents have fewer. A larger ``top_k`` appends
            answers and leaves the first ones as they are.
        max_answer_tokens: longest span, in tokens, before it is widened to words and graphemes.
        null_threshold: ``has_answer`` is true if null logit - best logit is at most this.
        align_to_words: widen spans to whole words.
        max_answer_chars: limit on the characters of all answers together; default: none.
        check: called between steps of a few milliseconds; its exceptions end the work and propagate.

    Raises:
        InvalidLogits: a logit is NaN, infinite or above 1e30, or a shape differs from its window's.
        InvalidArgument: ``top_k`` or ``max_answer_tokens`` is below 1, or the answers have more than
            ``max_answer_chars``; the latter names ``top_k`` and is raised before the texts are copied.
    """
    for name, value in (("top_k", top_k), ("max_answer_tokens", max_answer_tokens)):
        if value < 1:
            raise InvalidArgument((name,), f"must be at least 1; got {value}")

    null = _lowest_null(documents, logits, check)
    if null == np.inf:
        return Decoded((), has_answer=False, null_score=1.0, null_margin=np.inf)

    best: dict[_Place, float] = {}  # logits of the best distinct spans so far, in order
    softmax = _Softmax(null)
    for number, (windows, rows) in enumerate(zip(documents, logits, strict=True)):
        bounds = _token_bounds(windows, align_to_words, check)
        for first, band in _bands(windows, rows, max_answer_tokens, check):
            tops = band.max(axis=1)
            floor = next(reversed(best.values())) if len(best) == top_k else -math.inf
            found = _best_of_band(band, tops, first, bounds, floor, top_k)
            best = _merged(best, (((number, start, end), logit) for start, end, logit in found), top_k)
            softmax.add(band, float(tops.max()))
    _check_chars(best, max_answer_chars)
    best_logit = next(iter(best.values()))
    return Decoded(
        answers=tuple(
            Answer(documents[number].context[start:end], softmax.probability(logit), start, end, number)
            for (number, start, end), logit in best.items()
        ),
        has_answer=null - best_logit <= null_threshold,
        null_score=softmax.probability(null),
        null_margin=null - best_logit,
    )


class _Softmax:
    """A softmax whose logits arrive in blocks; it keeps the highest logit and the sum of exp(logit - highest)."""

    def __init__(self, logit: float) -> None:
        self._highest, self._sum = logit, 1.0

    def add(self, logits: FloatArray, highest: float) -> None:
        """Add logits, of which ``highest`` is the highest; overwrites them."""
        before, self._highest = self._highest, max(self._highest, highest)
        np.subtract(logits, np.float32(self._highest), out=logits)
        np.exp(logits, out=logits)
        self._sum = self._sum * math.exp(before - self._highest) + float(logits.sum(dtype=np.float64))

    def probability(self, logit: float) -> float:
        return min(math.exp(logit - self._highest) / self._sum, 1.0)


def _lowest_null(documents: Sequence[Windows], logits: Sequence[Sequence[Logits]], check: Callable[[], None]) -> float:
    """Check all logits, and return the lowest null logit of the windows, or infinity if there is no window."""
    null = math.inf
    for windows, rows in zip(documents, logits, strict=True):
        for window, pair in zip(windows.windows, rows, strict=True):
            check()
            _check_logits(window, pair)
            null = min(null, _null(*pair))
    return null


def _check_chars(places: Collection["_Place"], max_answer_chars: int | None) -> None:
    chars = sum(end - start for _, start, end in places)
    if max_answer_chars is not None and chars > max_answer_chars:
        raise InvalidArgument(
            ("top_k",),
            f"the best {len(places)} answers have {chars:,} characters together; "
            f"at most {max_answer_chars:,} are allowed",
        )


def best_of_each_window(
    documents: Sequence[Windows],
    logits: Sequence[Sequence[Logits]],
    *,
    max_answer_tokens: int = MAX_ANSWER_TOKENS,
    check: Callable[[], None] = lambda: None,
) -> Iterator[WindowSpan]:
    """Each window's own best span and null logit, in order; arguments and errors as in `decode`."""
    for number, (windows, rows) in enumerate(zip(documents, logits, strict=True)):
        starts, ends = _token_bounds(windows, False, check)
        for window, pair in zip(windows.windows, rows, strict=True):
            check()
            _check_logits(window, pair)
            sums = _window_sums(window, pair, max_answer_tokens, slice(0, window.tokens))
            first, extra = divmod(int(sums.argmax()), max_answer_tokens)
            yield WindowSpan(
                context_index=number,
                first_token=window.first_token,
                tokens=window.tokens,
                start=int(starts[window.first_token + first]),
                end=int(ends[window.first_token + first + extra]),
                logit=float(sums.max()),
                null_logit=_null(*pair),
            )


def are_real(values: FloatArray) -> bool:
    """Whether a model can have meant these logits, one or more: none is NaN, infinite, or of an absurd size."""
    # argmin and argmax find the first NaN, which no comparison holds for, and cost a quarter of min and max.
    return values.item(values.argmin()) > -_UNREAL and values.item(values.argmax()) < _UNREAL


_Place = tuple[int, int, int]
"""Document, first code point, one past the last."""


def _check_logits(window: Window, pair: Logits) -> None:
    for name, values in zip(("start_logits", "end_logits"), pair, strict=True):
        if values.shape != window.input_ids.shape:
            raise InvalidLogits(f"{name}: shape {values.shape}, but the window has {window.input_ids.shape}")
        if not are_real(values):
            raise InvalidLogits(f"{name}: NaN, infinite or absurdly large for a window of {window.length} tokens")


def _null(start_logits: FloatArray, end_logits: FloatArray) -> float:
    return float(start_logits[0, 0]) + float(end_logits[0, 0])


def _token_bounds(windows: Windows, align_to_words: bool, check: Callable[[], None]) -> tuple[IntArray, IntArray]:
    """Where a span starts that begins with each token, and where one ends that ends with it: int32 of shape (tokens,).

    In code points, widened to whole graphemes and, if asked for, to whole words; neither ever goes down.
    """
    starts, ends = windows.starts, windows.ends
    if not len(starts):
        return starts, ends
    if align_to_words:
        words = windows.words  # they never go down
        starts = starts[words.searchsorted(words)]
        ends = ends[words.searchsorted(words, "right") - 1]
    # Tokenizers give offsets in order. Should one not, its spans become wider, never wrong.
    starts = np.minimum.accumulate(starts[::-1])[::-1]
    ends = np.maximum.accumulate(ends)
    return widen_to_graphemes(windows.context, starts, ends, check=check)


def _bands(
    windows: Windows, rows: Sequence[Logits], max_answer_tokens: int, check: Callable[[], None]
) -> Iterator[tuple[int, FloatArray]]:
    """Logits of the spans of a document, in blocks: row i, column d is the span of tokens first + i to first + i + d.

    Yields the first token of each block and float32 of shape (tokens, columns), -inf where no window has the span; a
    block holds up to `_BLOCK` spans, but at least one token's.
    """
    columns = min(max_answer_tokens, max((window.tokens for window in windows.windows), default=1))
    height = max(_BLOCK // columns, 1)
    if len(windows.windows) == 1 and len(windows.starts) <= height:  # no other window or block has any of its spans
        yield 0, _window_sums(windows.windows[0], rows[0], columns, slice(None))
        return
    for first in range(0, len(windows.starts), height):
        band = np.full((min(height, len(windows.starts) - first), columns), _MASKED, dtype=np.float32)
        for window, pair in zip(windows.windows, rows, strict=True):
            low = max(first, window.first_token)
            high = min(first + len(band), window.first_token + window.tokens)
            if low < high:
                check()
                wanted = slice(low - window.first_token, high - window.first_token)
                part = band[low - first : high - first]
                np.maximum(part, _window_sums(window, pair, columns, wanted), out=part)
        yield first, band


def _window_sums(window: Window, pair: Logits, columns: int, rows: slice) -> FloatArray:
    """Logits of the spans of one window that begin with some of its tokens: float32 of shape (rows, columns)."""
    context = slice(window.offset, window.offset + window.tokens)
    ends = np.full(window.tokens + columns - 1, _MASKED, dtype=np.float32)
    ends[: window.tokens] = pair[1][0, context]
    size = ends.itemsize
    # Row i begins at element i: what `sliding_window_view` gives, for a tenth of its time.
    shifted = np.ndarray((window.tokens, columns), np.float32, ends, strides=(size, size))
    sums: FloatArray = pair[0][0, context][rows, None] + shifted[rows]
    return sums


def _best_of_band(
    band: FloatArray, tops: FloatArray, first: int, bounds: tuple[IntArray, IntArray], floor: float, wanted: int
) -> Iterator[tuple[int, int, float]]:
    """Start, end and logit of spans of a block above ``floor``: the best distinct ones are among them.

    A span's logit is the highest of the token spans that widen to it, and its place among equals that of the first of
    these with that logit. Spans come in the order of their tokens; only few of them, if any, come more than once.

    Args:
        band: float32 of shape (rows, columns), as `_bands` gives it.
        tops: the highest of each row, float32 of shape (rows,).
        first: token of the first row.
        bounds: as `_token_bounds` gives them.
        floor: logit that a span must exceed.
        wanted: number of distinct spans.
    """
    rows, columns = band.shape
    starts, ends = bounds[0][first : first + rows], bounds[1][first : first + rows + columns - 1]
    if wanted > 1:  # the best span of each distinct start is distinct from those of the others
        tops = np.maximum.reduceat(tops, np.flatnonzero(_changes(starts)))
    least = _highest(tops, wanted)
    logits = band.ravel()
    places = np.flatnonzero(logits >= least if least > floor else logits > floor)
    if len(places) > _FEW:
        places = _distinct(places, logits[places], columns, starts, ends, wanted)
    for place in places.tolist():
        row, extra = divmod(place, columns)
        yield int(starts[row]), int(ends[row + extra]), float(logits[place])


def _distinct(
    places: NDArray[np.intp], logits: FloatArray, columns: int, starts: IntArray, ends: IntArray, wanted: int
) -> NDArray[np.intp]:
    """Of places in a block, those of the ``wanted`` best distinct spans: the first of each span's best logit."""
    # Bounds never go down, so equal ones are neighbours, and the distinct spans of a block can be numbered without
    # sorting: each distinct start has a number for every distinct end that it can have.
    row, extra = np.divmod(places, columns)
    new_start = _changes(starts)
    heads, start_rank = np.flatnonzero(new_start), np.cumsum(new_start) - 1
    end_rank = np.cumsum(_changes(ends)) - 1
    tails = np.minimum(np.append(heads[1:], len(starts)) + columns - 2, len(ends) - 1)  # the last end it can have
    numbers = np.cumsum(np.append(0, end_rank[tails] - end_rank[heads] + 1))
    spans = (numbers[:-1] - end_rank[heads])[start_rank[row]] + end_rank[row + extra]
    best = np.full(numbers[-1], _MASKED, dtype=np.float32)
    np.maximum.at(best, spans, logits)
    kept = np.flatnonzero((logits == best[spans]) & (logits >= _highest(best, wanted)))
    kept = kept[np.sort(np.unique(spans[kept], return_index=True)[1])]
    kept = kept[np.argsort(-logits[kept], kind="stable")[:wanted]]
    return places[np.sort(kept)]


def _changes(values: IntArray) -> NDArray[np.bool_]:
    """Whether each value differs from the one before it; the first does."""
    changes = np.ones(len(values), dtype=np.bool_)
    np.not_equal(values[1:], values[:-1], out=changes[1:])
    return changes


def _highest(values: FloatArray, wanted: int) -> np.float32:
    """The lowest of the ``wanted`` highest values, or -inf where there are no more."""
    if len(values) <= wanted:
        return _MASKED
    # Of the negatives: NumPy takes twenty times as long to find a value near the end of many equal ones.
    cut: np.float32 = -np.partition(-values, wanted - 1)[wanted - 1]
    return cut


def _merged(best: dict[_Place, float], found: Iterable[tuple[_Place, float]], wanted: int) -> dict[_Place, float]:
    """The best of both, ties in order: those found later rank lower."""
    merged = dict(best)
    for place, logit in found:
        if logit > merged.get(place, -np.inf):
            merged.pop(place, None)  # so that it stands where its better logit was found
            merged[place] = logit
    return dict(sorted(merged.items(), key=lambda item: -item[1])[:wanted])
