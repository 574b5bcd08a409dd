r"""User-perceived characters: snap spans to grapheme clusters, and count offsets in other units than code points.

Cluster boundaries are those of Unicode Annex 29, from the Oniguruma ``\X`` inside the tokenizers package.
"""

import unicodedata
from typing import Literal

from tokenizers import Regex, pre_tokenizers

OffsetUnit = Literal["codepoint", "utf16", "byte"]

_CLUSTERS = pre_tokenizers.Split(Regex(r"\X"), "isolated")

_REACH = 4  # code points looked at first on either side
_UNDECIDED = {"Mn", "Mc", "Me", "Cf"}  # after marks and joiners, a break may depend on what stands before them


def snap_to_graphemes(text: str, start: int, end: int) -> tuple[int, int]:
    """Widen the code points [start, end) of a text to whole grapheme clusters."""
    if start == end or (text.isascii() and "\r\n" not in text):
        return start, end
    return _cluster_around(text, start)[0], _cluster_around(text, end - 1)[1]


def _cluster_around(text: str, position: int) -> tuple[int, int]:
    """Bounds of the cluster that holds the code point at ``position``."""
    # Only a slice is segmented, for a text may be long and is asked about many times. The rules look one code point
    # ahead, so a cluster that ends before its slice is whole. They look back without limit over marks, joiners and
    # flags, so the slice must hold a break after something else, or begin with the text.
    reach = _REACH
    while True:
        low, high = max(position - reach, 0), min(position + 1 + reach, len(text))
        certain = low == 0
        start, end = low, high
        for _, (first, last) in _CLUSTERS.pre_tokenize_str(text[low:high]):
            start, end = low + int(first), low + int(last)
            certain = certain or (start > low and _decides(text[start - 1]))
            if end > position:
                break
        if certain and (end < high or high == len(text)):
            return start, end
        reach *= 4


def _decides(character: str) -> bool:
    """Whether a break after it holds, whatever stands before it."""
    flag = "\U0001f1e6" <= character <= "\U0001f1ff"  # flags are pairs of these, counted from the first of a run
    return not flag and unicodedata.category(character) not in _UNDECIDED


def offset_in(text: str, position: int, unit: OffsetUnit) -> int:
    """Count the units of ``text`` before a code point position: UTF-16 code units, UTF-8 bytes, or code points."""
    if unit == "codepoint" or text.isascii():
        return position
    if unit == "utf16":
        return len(text[:position].encode("utf-16-le")) // 2
    return len(text[:position].encode())
