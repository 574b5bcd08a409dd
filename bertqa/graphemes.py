r"""User-perceived characters: snap spans to grapheme clusters, and count offsets in other units than code points.

Cluster boundaries are those of Unicode Annex 29, from the Oniguruma ``\X`` inside the tokenizers package.
"""

import re
from typing import Literal

from tokenizers import Regex, pre_tokenizers

OffsetUnit = Literal["codepoint", "utf16", "byte"]

_CLUSTERS = pre_tokenizers.Split(Regex(r"\X"), "isolated")

# Two neighbours of this class never belong to one cluster: printable ASCII, precomposed Latin and Greek and Cyrillic
# letters, kana, ideographs, and precomposed Hangul syllables (UAX 29 rules GB6-GB8 join those only with jamo).
_PLAIN = (
    r"[\u0020-\u007e\u00c0-\u024f\u0391-\u03a9\u03b1-\u03c9\u0410-\u044f"
    r"\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fff\uac00-\ud7a3]"
)
_BREAK = re.compile(f"(?<={_PLAIN})(?={_PLAIN})")
_REACH = 64  # code points looked back at first for a certain boundary


def snap_to_graphemes(text: str, start: int, end: int) -> tuple[int, int]:
    """Widen the code points [start, end) of a text to whole grapheme clusters."""
    if start == end or (text.isascii() and "\r\n" not in text):
        return start, end
    return _cluster_around(text, start)[0], _cluster_around(text, end - 1)[1]


def _cluster_around(text: str, position: int) -> tuple[int, int]:
    """Bounds of the cluster that holds the code point at ``position``."""
    # Only a slice is segmented: from a certain boundary before the position to one after it.
    begin, reach = 0, _REACH
    while (low := position - reach) > 0:
        found = [match.start() for match in _BREAK.finditer(text, low, position + 1)]
        if found:
            begin = found[-1]
            break
        reach *= 4
    after = _BREAK.search(text, position + 1)
    stop = after.start() if after else len(text)
    for _, (first, last) in _CLUSTERS.pre_tokenize_str(text[begin:stop]):
        if begin + last > position:
            return begin + int(first), begin + int(last)
    raise AssertionError("clusters cover the text")


def offset_in(text: str, position: int, unit: OffsetUnit) -> int:
    """Count the units of ``text`` before a code point position: UTF-16 code units, UTF-8 bytes, or code points."""
    if unit == "codepoint" or text.isascii():
        return position
    if unit == "utf16":
        return len(text[:position].encode("utf-16-le")) // 2
    return len(text[:position].encode())
