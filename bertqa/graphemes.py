r"""Widen spans to grapheme clusters (user-perceived characters), and convert offsets from code points to other units.

Cluster boundaries are those of Unicode Annex 29, from the Oniguruma ``\X`` inside the tokenizers package.
"""

import re
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, pre_tokenizers

OffsetUnit = Literal["codepoint", "utf16", "byte"]

IntArray = NDArray[np.int32]

_CLUSTERS = pre_tokenizers.Split(Regex(r"\X"), "isolated")

_PIECE = 64  # code points segmented in one step; more if a cluster is longer
# Oniguruma counts all flags before each flag, which is quadratic in the length of a run unless the run is cut.
_MANY_FLAGS = re.compile(r"[\U0001f1e6-\U0001f1ff]{64}")

_UNKNOWN, _JOINS, _ALONE = 0, 1, 2
_KINDS = np.full(0x110000, _UNKNOWN, dtype=np.uint8)  # of each code point; filled on first use
_KINDS[ord("\r")] = _JOINS  # joins only a line feed, which `_kind_of` does not try


def widen_to_graphemes(
    text: str, starts: IntArray, ends: IntArray, *, check: Callable[[], None] = lambda: None
) -> tuple[IntArray, IntArray]:
    """Move starts down and ends up to the nearest boundaries of grapheme clusters.

    The text is segmented once, in time linear in its length, for any number of positions.

    Args:
        text: any text without lone surrogates.
        starts: int32, code points in [0, len(text)].
        ends: the same, of any shape.
        check: called between steps of at most a few milliseconds; its exceptions end the work.
    """
    if text.isascii() and "\r\n" not in text:
        return starts, ends
    breaks = np.flatnonzero(_breaks(text, check)).astype(np.int32)
    return breaks[np.searchsorted(breaks, starts, "right") - 1], breaks[np.searchsorted(breaks, ends, "left")]


def _breaks(text: str, check: Callable[[], None]) -> NDArray[np.bool_]:
    """Return whether there is a boundary before each code point and after the last: shape (len(text) + 1,)."""
    alone = _stand_alone(text, check)
    joins = np.zeros(len(text) + 1, dtype=np.int8)  # 1 if the characters on both sides may belong together
    joins[1:-1] = ~(alone[:-1] & alone[1:])
    breaks: NDArray[np.bool_] = joins == 0
    runs = np.flatnonzero(np.diff(joins)).reshape(-1, 2)  # index before each run of ones, and its last index
    done = 0
    for before, last in runs.tolist():
        for end in _cluster_ends(text, before, last + 1):
            breaks[end] = True
            if end >= done:
                check()
                done = end + 4 * _PIECE
    return breaks


def _cluster_ends(text: str, low: int, high: int) -> Iterator[int]:
    """Yield the ends of the clusters of ``text[low:high]``; ``low`` and ``high`` must be boundaries."""
    # The rules look one code point ahead, so a cluster that ends before its piece does is complete. They look back only
    # to the nearest boundary, so the next piece may begin at any boundary.
    size = _PIECE
    while low < high:
        stop = min(low + size, high)
        if flags := _MANY_FLAGS.search(text, low, stop):
            stop = flags.end()
        ends = [low + int(end) for _, (_, end) in _CLUSTERS.pre_tokenize_str(text[low:stop])]
        if stop < high:
            ends.pop()
        if not ends:
            size *= 4
            continue
        yield from ends
        low, size = ends[-1], _PIECE


def _stand_alone(text: str, check: Callable[[], None]) -> NDArray[np.bool_]:
    """Return whether each code point joins no other such code point: letters, ideographs, syllables, most emoji."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    kinds = _KINDS[codes]
    if not kinds.all():
        for number, code in enumerate(np.unique(codes[kinds == _UNKNOWN]).tolist()):
            if number % 1024 == 0:
                check()
            _KINDS[code] = _kind_of(chr(code))
        kinds = _KINDS[codes]
    alone: NDArray[np.bool_] = kinds == _ALONE
    return alone


def _kind_of(character: str) -> int:
    # Marks and joiners join the letter before them, prepended marks the letter after, flags and jamo their own kind. No
    # two of the rest join: a pictograph joins another only after a joiner, and a syllable joins only a jamo.
    return _ALONE if len(_CLUSTERS.pre_tokenize_str(f"a{character}{character}a")) == 4 else _JOINS


def offset_in(text: str, position: int, unit: OffsetUnit) -> int:
    """Convert a position from code points to ``unit``: UTF-16 code units, UTF-8 bytes, or code points."""
    if unit == "codepoint" or text.isascii():
        return position
    if unit == "utf16":
        return len(text[:position].encode("utf-16-le")) // 2
    return len(text[:position].encode())
