r"""User-perceived characters: widen spans to grapheme clusters, and count offsets in other units than code points.

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

_PIECE = 64  # code points segmented at once; more only where a cluster is longer
# Oniguruma counts the flags before each flag: the square of the length of a run, unless the run is cut.
_MANY_FLAGS = re.compile(r"[\U0001f1e6-\U0001f1ff]{64}")

_UNKNOWN, _JOINS, _ALONE = 0, 1, 2
_KINDS = np.full(0x110000, _UNKNOWN, dtype=np.uint8)  # of each code point; filled as texts hold them
_KINDS[ord("\r")] = _JOINS  # with the line feed only, which `_kind_of` does not try


def widen_to_graphemes(
    text: str, starts: IntArray, ends: IntArray, *, check: Callable[[], None] = lambda: None
) -> tuple[IntArray, IntArray]:
    """Move starts down and ends up to the nearest boundaries of grapheme clusters.

    The text is segmented once, in time linear in its length, however many places are asked for.

    Args:
        text: any text without lone surrogates.
        starts: int32, code points in [0, len(text)].
        ends: the same, of any shape.
        check: called between steps of at most a few milliseconds; what it raises ends the work.
    """
    if text.isascii() and "\r\n" not in text:
        return starts, ends
    breaks = np.flatnonzero(_breaks(text, check)).astype(np.int32)
    return breaks[np.searchsorted(breaks, starts, "right") - 1], breaks[np.searchsorted(breaks, ends, "left")]


def _breaks(text: str, check: Callable[[], None]) -> NDArray[np.bool_]:
    """Whether a cluster begins or ends before each code point, and after the last: shape (len(text) + 1,)."""
    alone = _stand_alone(text, check)
    joins = np.zeros(len(text) + 1, dtype=np.int8)  # where the characters on both sides may belong together
    joins[1:-1] = ~(alone[:-1] & alone[1:])
    breaks: NDArray[np.bool_] = joins == 0
    runs = np.flatnonzero(np.diff(joins)).reshape(-1, 2)  # before each first joined place, and the last one
    done = 0
    for before, last in runs.tolist():
        for end in _cluster_ends(text, before, last + 1):
            breaks[end] = True
            if end >= done:
                check()
                done = end + 4 * _PIECE
    return breaks


def _cluster_ends(text: str, low: int, high: int) -> Iterator[int]:
    """Ends of the clusters of ``text[low:high]``, which begins and ends with a boundary of the whole text."""
    # The rules look one code point ahead, so a cluster that ends before its piece is whole; and they look back no
    # further than the nearest boundary, so the next piece may begin at any.
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
    """Whether each code point is one that joins no other one of these: letters, ideographs, syllables, most emoji."""
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
    # Marks and joiners join the letter before them, prepended marks the one after, flags and jamo their own kind. Of
    # what is left, no two join: a pictograph joins one only after a joiner, a syllable only a jamo.
    return _ALONE if len(_CLUSTERS.pre_tokenize_str(f"a{character}{character}a")) == 4 else _JOINS


def offset_in(text: str, position: int, unit: OffsetUnit) -> int:
    """Count the units of ``text`` before a code point position: UTF-16 code units, UTF-8 bytes, or code points."""
    if unit == "codepoint" or text.isascii():
        return position
    if unit == "utf16":
        return len(text[:position].encode("utf-16-le")) // 2
    return len(text[:position].encode())
