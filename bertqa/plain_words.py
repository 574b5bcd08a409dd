"""Cache the tokens of words, so that most of an English text costs only table lookups.

The tokenizer still does all tokenizing. In lower-case plain ASCII, BERT's pre-tokenizer ends a word at white space and
separates punctuation marks, and WordPiece looks at one word at a time. So a word has the same tokens in every text, and
the tokenizer sees each word only once.
"""

import re
from collections.abc import Collection
from itertools import groupby

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

_WORDS = re.compile("[a-z0-9]+|[^a-z0-9]")  # words, punctuation marks, white space: every character matches
_SPACE = -1  # instead of a token's id
_LONGEST = 32  # letters of a cached word, at most
_MOST = 20_000  # cached words, at most; about 4 MB


class PlainWords:
    """A cache of the tokens of lower-case words in plain ASCII; threads can share it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Begin empty.

        Args:
            tokenizer: for lower-case plain ASCII, with BERT's pre-tokenizer and WordPiece.
        """
        self._tokenizer = tokenizer
        self._table: dict[str, bytes] = {}

    def tokens(self, text: str) -> NDArray[np.int32] | None:
        """Return id, start, end (in characters) and word number of a text's tokens: int32 of shape (4, tokens).

        Args:
            text: tabs, line ends and printable ASCII without capital letters.

        Returns:
            None if the text has a very long word; then use the tokenizer itself.
        """
        words = _WORDS.findall(text)
        table = self._table
        try:
            packed = b"".join(map(table.__getitem__, words))
        except KeyError:
            new = {word for word in words if word not in table}
            if max(map(len, new)) > _LONGEST:
                return None
            if len(table) + len(new) > _MOST:
                table = self._table = {}  # a new dict, because other threads may read the old one
                new = set(words)
                if max(map(len, new)) > _LONGEST:
                    return None
            self._learn(table, new)
            packed = b"".join(map(table.__getitem__, words))
        ids, lengths, begins = np.frombuffer(packed, np.int32).reshape(-1, 3).T
        ends = lengths.cumsum(dtype=np.int32)
        kept = ids != _SPACE
        found = np.empty((4, np.count_nonzero(kept)), dtype=np.int32)
        found[0] = ids[kept]
        found[2] = ends[kept]
        np.subtract(found[2], lengths[kept], out=found[1])
        np.cumsum(begins[kept], out=found[3])
        found[3] -= 1
        return found

    def _learn(self, table: dict[str, bytes], words: Collection[str]) -> None:
        """Add words to a table: for each token its id, its length, and 1 if it is the first of its word."""
        table.update((word, _pack([(_SPACE, 1, 0)])) for word in words if word.isspace())
        asked = [word for word in words if not word.isspace()]
        encoding = self._tokenizer.encode(asked, is_pretokenized=True, add_special_tokens=False)
        tokens = zip(encoding.word_ids, encoding.ids, encoding.offsets, strict=True)
        for number, group in groupby(tokens, key=lambda token: token[0]):
            parts = [(token, end - start, int(place == 0)) for place, (_, token, (start, end)) in enumerate(group)]
            table[asked[number]] = _pack(parts)


def _pack(tokens: list[tuple[int, int, int]]) -> bytes:
    return np.array(tokens, dtype=np.int32).tobytes()
