"""Turn the start and end logits of windows into ranked answers with exact character offsets.

Every pair (first token, last token) of every window of every document is one outcome, and "no answer" is one more. One
softmax covers all of them: with logits s and e, P(i, j) = exp(s_i + e_j) / Z as in Devlin et al. 2018, section 4.2, but
with one Z for all windows and documents. So scores are in [0, 1] and can be compared across windows and documents. A
span in two overlapping windows counts once, with its better score. The null score is s_[CLS] + e_[CLS], as in section
4.3 of the paper, at its minimum over the windows: a text has no answer only if none of its windows has one.
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
"""Default limit on the length of an answer, in tokens, as in the original SQuAD scripts."""

FloatArray = NDArray[np.float32]
Logits = tuple[FloatArray, FloatArray]
"""Start and end logits of one window, each float32 of shape (1, length)."""

_BLOCK = 1 << 18  # spans in one step: a few milliseconds of work and up to 64 bytes of memory each
_FEW = 64  # up to this many spans, Python is faster than NumPy
_MASKED = np.float32(-np.inf)
_UNREAL = float(np.float32(1e30))  # far above any model's logits; the sum of two smaller ones cannot overflow


class InvalidLogits(ValueError):
    """The engine's output is unusable: NaN, infinite, absurdly large, or of the wrong shape for its window."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A span of a context; ``context[start:end] == text`` always holds."""

    text: str
    score: float  # probability in [0, 1], joint over all windows and documents
    start: int  # first code point
    end: int  # one past the last code point
    context_index: int  # index of the document


@dataclass(frozen=True, slots=True)
class WindowSpan:
    """The best span of one window, for explanations; ``start`` and ``end`` are code points of its context."""

    context_index: int
    first_token: int
    tokens: int
    start: int
    end: int
    logit: float  # start logit + end logit of the span
    null_logit: float  # start logit + end logit of [CLS]


@dataclass(frozen=True, slots=True)
class Decoded:
    """Ranked answers to one question, and how likely it has none."""

    answers: tuple[Answer, ...]
    has_answer: bool
    null_score: float  # probability of "no answer" in [0, 1]; 1.0 if the documents have no token
    null_margin: float  # null logit minus the best span's logit; compared with the threshold

    @property
    def best(self) -> Answer | None:
        """The first answer, or None if the documents have no token."""
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
    _check_positive(top_k=top_k, max_answer_tokens=max_answer_tokens)
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


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise InvalidArgument((name,), f"must be at least 1; got {value}")


class _Softmax:
    """A softmax whose logits arrive in blocks; it keeps the highest logit and the sum of exp(logit - highest)."""

    def __init__(self, logit: float) -> None:
        self._highest, self._sum = logit, 1.0

    def add(self, logits: FloatArray, highest: float) -> None:
        """Add a block of logits and overwrite it; ``highest`` is its maximum."""
        before, self._highest = self._highest, max(self._highest, highest)
        np.subtract(logits, np.float32(self._highest), out=logits)
        np.exp(logits, out=logits)
        self._sum = self._sum * math.exp(before - self._highest) + float(logits.sum(dtype=np.float64))

    def probability(self, logit: float) -> float:
        return min(math.exp(logit - self._highest) / self._sum, 1.0)


def _lowest_null(documents: Sequence[Windows], logits: Sequence[Sequence[Logits]], check: Callable[[], None]) -> float:
    """Check all logits and return the lowest null logit; infinity if there is no window."""
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
    """Yield the best span and the null logit of each window, in order; arguments and errors as in `decode`."""
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
    """Return whether no logit is NaN, infinite or absurdly large; ``values`` must not be empty."""
    # argmin and argmax return the first NaN, for which every comparison is false. They take a quarter of the time of
    # min and max.
    return values.item(values.argmin()) > -_UNREAL and values.item(values.argmax()) < _UNREAL


_Place = tuple[int, int, int]
"""Index of the document, first code point, one past the last."""


def _check_logits(window: Window, pair: Logits) -> None:
    for name, values in zip(("start_logits", "end_logits"), pair, strict=True):
        if values.shape != window.input_ids.shape:
            raise InvalidLogits(f"{name}: has shape {values.shape}, but the window has {window.input_ids.shape}")
        if not are_real(values):
            raise InvalidLogits(f"{name}: NaN, infinite or absurdly large for a window of {window.length} tokens")


def _null(start_logits: FloatArray, end_logits: FloatArray) -> float:
    return float(start_logits[0, 0]) + float(end_logits[0, 0])


def _token_bounds(windows: Windows, align_to_words: bool, check: Callable[[], None]) -> tuple[IntArray, IntArray]:
    """Return where a span that begins with each token starts, and where one that ends with it ends, in code points.

    Both are int32 of shape (tokens,), widened to whole graphemes and optionally to whole words, and never decrease.
    """
    starts, ends = windows.starts, windows.ends
    if not len(starts):
        return starts, ends
    if align_to_words:
        words = windows.words  # never decreases
        starts = starts[words.searchsorted(words)]
        ends = ends[words.searchsorted(words, "right") - 1]
    # Tokenizers give offsets in order. If one does not, its spans become wider, never wrong.
    starts = np.minimum.accumulate(starts[::-1])[::-1]
    ends = np.maximum.accumulate(ends)
    return widen_to_graphemes(windows.context, starts, ends, check=check)


def _bands(
    windows: Windows, rows: Sequence[Logits], max_answer_tokens: int, check: Callable[[], None]
) -> Iterator[tuple[int, FloatArray]]:
    """Yield the logits of a document's spans in blocks, each with its first token.

    A block is float32 of shape (tokens, columns). Row i, column d is the span of tokens first + i to first + i + d; it
    is -inf if no window has the span. A block has up to `_BLOCK` spans, but at least those of one token.
    """
    columns = min(max_answer_tokens, max((window.tokens for window in windows.windows), default=1))
    height = max(_BLOCK // columns, 1)
    if len(windows.windows) == 1 and len(windows.starts) <= height:  # one block, and no overlapping windows
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
    """Return the logits of the spans that begin with the given tokens of a window: float32 of shape (rows, columns)."""
    context = slice(window.offset, window.offset + window.tokens)
    ends = np.full(window.tokens + columns - 1, _MASKED, dtype=np.float32)
    ends[: window.tokens] = pair[1][0, context]
    size = ends.itemsize
    # Row i begins at element i, as with `sliding_window_view`, in a tenth of its time.
    shifted = np.ndarray((window.tokens, columns), np.float32, ends, strides=(size, size))
    sums: FloatArray = pair[0][0, context][rows, None] + shifted[rows]
    return sums


def _best_of_band(
    band: FloatArray, tops: FloatArray, first: int, bounds: tuple[IntArray, IntArray], floor: float, wanted: int
) -> Iterator[tuple[int, int, float]]:
    """Yield start, end and logit of spans in a block above ``floor``; the best distinct spans are among them.

    The logit of a span is the highest of the token spans that widen to it. Among equal logits, it ranks where the first
    token span with that logit does. Spans come in the order of their tokens; a few may come more than once.

    Args:
        band: float32 of shape (rows, columns), from `_bands`.
        tops: maximum of each row, float32 of shape (rows,).
        first: token of the first row.
        bounds: from `_token_bounds`.
        floor: only spans with a higher logit are yielded.
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
    """Select the places of the ``wanted`` best distinct spans of a block: for each, the first with its best logit."""
    # Bounds never decrease, so equal bounds are neighbours. This numbers the distinct spans of a block without sorting:
    # each distinct start gets a number for every distinct end that it can have.
    row, extra = np.divmod(places, columns)
    new_start = _changes(starts)
    heads, start_rank = np.flatnonzero(new_start), np.cumsum(new_start) - 1
    end_rank = np.cumsum(_changes(ends)) - 1
    tails = np.minimum(
        np.append(heads[1:], len(starts)) + columns - 2, len(ends) - 1
    )  # the last end that each can have
    numbers = np.cumsum(np.append(0, end_rank[tails] - end_rank[heads] + 1))
    spans = (numbers[:-1] - end_rank[heads])[start_rank[row]] + end_rank[row + extra]
    best = np.full(numbers[-1], _MASKED, dtype=np.float32)
    np.maximum.at(best, spans, logits)
    kept = np.flatnonzero((logits == best[spans]) & (logits >= _highest(best, wanted)))
    kept = kept[np.sort(np.unique(spans[kept], return_index=True)[1])]
    kept = kept[np.argsort(-logits[kept], kind="stable")[:wanted]]
    return places[np.sort(kept)]


def _changes(values: IntArray) -> NDArray[np.bool_]:
    """Return whether each value differs from the one before; True for the first."""
    changes = np.ones(len(values), dtype=np.bool_)
    np.not_equal(values[1:], values[:-1], out=changes[1:])
    return changes


def _highest(values: FloatArray, wanted: int) -> np.float32:
    """Return the lowest of the ``wanted`` highest values; -inf if there are no more values than that."""
    if len(values) <= wanted:
        return _MASKED
    # On negated values: NumPy is twenty times slower at finding a value near the end of many equal ones.
    cut: np.float32 = -np.partition(-values, wanted - 1)[wanted - 1]
    return cut


def _merged(best: dict[_Place, float], found: Iterable[tuple[_Place, float]], wanted: int) -> dict[_Place, float]:
    """Merge both and keep the best; of equal logits, the one found first ranks higher."""
    merged = dict(best)
    for place, logit in found:
        if logit > merged.get(place, -np.inf):
            merged.pop(place, None)  # so that it ranks where its better logit was found
            merged[place] = logit
    return dict(sorted(merged.items(), key=lambda item: -item[1])[:wanted])
