"""Question + context -> overlapping token windows, the tensors that a BERT question-answering engine takes.

A window is ``[CLS] question [SEP] piece of the context [SEP]`` (Devlin et al. 2018, section 4.2), padded to one of a
few length buckets so that an engine needs one optimization profile per bucket instead of one per length. The context
is tokenized once; windows are slices of its tokens, so a character offset never depends on the window it was found in.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

INPUT_NAMES = ("input_ids", "attention_mask", "token_type_ids")
"""The engine's inputs, in order; each int32 of shape (1, length)."""
OUTPUT_NAMES = ("start_logits", "end_logits")
"""The engine's outputs, in order; each float32 of shape (1, length)."""

BUCKETS = (64, 128, 192, 256, 384, 512)
"""Lengths, in tokens, to which windows are padded."""
MAX_SEQ_LEN = 384
"""Default length of a full window, in tokens, special tokens included."""
OVERLAP = 128
"""Default number of context tokens that two neighbouring windows share (Hugging Face calls this ``doc_stride``)."""
MAX_QUESTION_TOKENS = 64
"""Default number of question tokens kept."""

SPECIAL_TOKENS = 3  # [CLS] question [SEP] context [SEP]

IntArray = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Window:
    """One engine call and the place of its context tokens, both in the window and in the context."""

    input_ids: IntArray  # (1, length)
    attention_mask: IntArray  # (1, length), 1 for a token and 0 for padding
    token_type_ids: IntArray  # (1, length), 1 for the context and its [SEP]
    offset: int  # position in the window of its first context token
    first_token: int  # index among the context's tokens of that first one
    tokens: int  # number of context tokens in the window

    @property
    def length(self) -> int:
        """Padded length, in tokens: one of the buckets."""
        return int(self.input_ids.shape[1])

    def tensors(self) -> dict[str, IntArray]:
        """The engine's inputs by name, each int32 of shape (1, length)."""
        return {name: getattr(self, name) for name in INPUT_NAMES}


@dataclass(frozen=True, slots=True)
class Windows:
    """All windows of one question over one context, with the map from context tokens back to characters."""

    context: str
    windows: tuple[Window, ...]  # empty when the context holds no token
    starts: IntArray  # (context tokens,), first code point of each token
    ends: IntArray  # (context tokens,), one past its last code point
    words: IntArray  # (context tokens,), number of the word that each token is a piece of
    question_tokens: int  # tokens of the question before truncation
    question_truncated: bool

    def token_span(self, start: int, end: int) -> tuple[int, int] | None:
        """First and last context token touching the code points [start, end), or None where no token does."""
        first = int(np.searchsorted(self.ends, start, side="right"))
        last = int(np.searchsorted(self.starts, end, side="left")) - 1
        return (first, last) if first <= last else None


class WindowMaker:
    """Makes windows with one tokenizer; immutable, so one instance serves any number of threads.

    The tokenizer is copied with truncation and padding off: those are mutable state inside the Rust object, and
    changing them per call is what makes a shared fast tokenizer fail with "Already borrowed" under concurrency.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_seq_len: int = MAX_SEQ_LEN,
        max_question_tokens: int = MAX_QUESTION_TOKENS,
        overlap: int = OVERLAP,
        buckets: Sequence[int] = BUCKETS,
    ) -> None:
        """Bind a tokenizer and the limits, in tokens.

        Raises:
            ValueError: the tokenizer has no [CLS], [SEP] or [PAD], or a limit is out of range.
        """
        self.buckets = tuple(sorted(buckets))
        if not self.buckets or self.buckets[0] < 1:
            raise ValueError(f"buckets must be positive lengths, not {tuple(buckets)}")
        self.max_seq_len = max_seq_len
        self.max_question_tokens = max_question_tokens
        self.overlap = overlap
        self._check_limits(max_seq_len, max_question_tokens)
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.encode_special_tokens = True  # "[SEP]" in a text is text
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._plain_ascii = _without_normalizer(self._tokenizer)
        self._cls, self._sep, self._pad = (self._special(token) for token in ("[CLS]", "[SEP]", "[PAD]"))

    @classmethod
    def from_directory(
        cls,
        directory: Path,
        *,
        max_seq_len: int = MAX_SEQ_LEN,
        max_question_tokens: int = MAX_QUESTION_TOKENS,
        overlap: int = OVERLAP,
        buckets: Sequence[int] = BUCKETS,
    ) -> "WindowMaker":
        """Load ``tokenizer.json`` of a checkpoint directory; limits as in the constructor.

        Raises:
            ValueError: the file is missing or is not a tokenizer; the message names it.
        """
        path = directory / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the binding raises bare Exception for every cause
            raise ValueError(f"{path}: not a readable tokenizer ({error})") from error
        return cls(
            tokenizer,
            max_seq_len=max_seq_len,
            max_question_tokens=max_question_tokens,
            overlap=overlap,
            buckets=buckets,
        )

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids, added tokens included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def tokenizer_json(self) -> str:
        """The tokenizer as the text of a ``tokenizer.json``, without truncation and padding."""
        return str(self._tokenizer.to_str(pretty=False))

    def unknown_share(self, text: str) -> float:
        """Share of the tokens of a text that are [UNK]; 0.0 for an empty text."""
        tokens = self._tokenizer.encode(text, add_special_tokens=False).tokens
        return tokens.count("[UNK]") / len(tokens) if tokens else 0.0

    def __call__(
        self,
        question: str,
        context: str,
        *,
        overlap: int | None = None,
        max_seq_len: int | None = None,
        max_question_tokens: int | None = None,
    ) -> Windows:
        """Tokenize a question and a context into windows.

        Args:
            question: kept up to ``max_question_tokens`` tokens; a cut is reported, not hidden.
            context: any text; one window for each ``max_seq_len - question - 3 - overlap`` of its tokens.
            overlap: context tokens that neighbouring windows share; by default this maker's own, or half of a window's
                context where the window is too short for that.
            max_seq_len: length of a full window, this maker's own by default.
            max_question_tokens: by default this maker's own, or what a shorter ``max_seq_len`` leaves room for.

        Raises:
            ValueError: a text is not valid Unicode (lone surrogates), the question holds no token, or a limit is out
                of range; the message begins with the name of the argument.
        """
        max_seq_len = self.max_seq_len if max_seq_len is None else max_seq_len
        if max_question_tokens is None:
            max_question_tokens = min(self.max_question_tokens, max_seq_len - SPECIAL_TOKENS - 1)
        self._check_limits(max_seq_len, max_question_tokens)
        check_unicode("question", question)
        check_unicode("context", context)

        question_ids = self._encode(question).ids
        if not question_ids:
            raise ValueError("question: holds no token that the model knows")
        kept = question_ids[:max_question_tokens]
        head = np.array([self._cls, *kept, self._sep], dtype=np.int32)
        room = max_seq_len - len(head) - 1
        if overlap is None:
            overlap = min(self.overlap, room // 2)
        if not 0 <= overlap < room:
            raise ValueError(
                f"overlap: must be from 0 to {room - 1}, the context tokens that a window of {max_seq_len} holds "
                f"beside this question, less one; got {overlap!r:.40}"
            )

        encoding = self._encode(context)
        ids = np.array(encoding.ids, dtype=np.int32)
        # Flat first: NumPy takes several times as long to read a list of tuples.
        offsets = np.fromiter(chain.from_iterable(encoding.offsets), np.int32, 2 * len(ids)).reshape(-1, 2)
        words = np.array(encoding.word_ids, dtype=np.int32)
        firsts = range(0, max(len(ids) - overlap, 1), room - overlap) if len(ids) else range(0)
        return Windows(
            context=context,
            windows=tuple(self._window(head, ids[first : first + room], first) for first in firsts),
            starts=np.ascontiguousarray(offsets[:, 0]),
            ends=np.ascontiguousarray(offsets[:, 1]),
            words=words,
            question_tokens=len(question_ids),
            question_truncated=len(kept) < len(question_ids),
        )

    def _encode(self, text: str) -> Encoding:
        if self._plain_ascii is not None and not _NOT_PLAIN_ASCII.search(text):
            return self._plain_ascii.encode(text.lower(), add_special_tokens=False)
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _window(self, head: IntArray, piece: IntArray, first: int) -> Window:
        used = len(head) + len(piece) + 1
        length = next(bucket for bucket in self.buckets if bucket >= used)
        input_ids = np.full((1, length), self._pad, dtype=np.int32)
        input_ids[0, : len(head)] = head
        input_ids[0, len(head) : used - 1] = piece
        input_ids[0, used - 1] = self._sep
        attention_mask = np.zeros((1, length), dtype=np.int32)
        attention_mask[0, :used] = 1
        token_type_ids = np.zeros((1, length), dtype=np.int32)
        token_type_ids[0, len(head) : used] = 1
        return Window(input_ids, attention_mask, token_type_ids, len(head), first, len(piece))

    def _check_limits(self, max_seq_len: int, max_question_tokens: int) -> None:
        shortest = SPECIAL_TOKENS + 2  # one token of the question and one of the context
        if not shortest <= max_seq_len <= self.buckets[-1]:
            raise ValueError(
                f"max_seq_len: must be from {shortest} to {self.buckets[-1]}, the longest bucket; "
                f"got {max_seq_len!r:.40}"
            )
        if not 1 <= max_question_tokens <= max_seq_len - SPECIAL_TOKENS - 1:
            raise ValueError(
                f"max_question_tokens: must be from 1 to max_seq_len - {SPECIAL_TOKENS + 1} = "
                f"{max_seq_len - SPECIAL_TOKENS - 1}; got {max_question_tokens!r:.40}"
            )

    def _special(self, token: str) -> int:
        number = self._tokenizer.token_to_id(token)
        if number is None:
            raise ValueError(f"the tokenizer has no {token} token; BERT needs it")
        return int(number)


_NOT_PLAIN_ASCII = re.compile(r"[^\t\n\r -~]")


def _without_normalizer(tokenizer: Tokenizer) -> Tokenizer | None:
    """The same tokenizer for lower-cased plain ASCII, a third faster; None where lower case is not all that it lacks.

    Of what BERT's uncased normalizer does, only lower case changes printable ASCII, and it moves no offset.
    """
    described = json.loads(tokenizer.to_str())
    normalizer = described["normalizer"] or {}
    if normalizer.get("type") != "BertNormalizer" or not normalizer.get("lowercase"):
        return None
    plain = Tokenizer.from_str(json.dumps(described | {"normalizer": None}))
    plain.encode_special_tokens = True
    return plain


def check_unicode(name: str, text: str) -> None:
    """Refuse a text with lone surrogates, which no UTF-8 text can hold.

    Raises:
        ValueError: the message begins with ``name`` and gives the place.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: not valid Unicode, lone surrogate at character {error.start}") from None
