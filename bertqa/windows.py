"""Turn a question and a context into overlapping token windows, the input of a BERT question-answering engine.

A window is ``[CLS] question [SEP] piece of the context [SEP]`` (Devlin et al. 2018, section 4.2), padded to one of a
few length buckets. So an engine needs one optimization profile per bucket, not one per length. The context is tokenized
once and windows are slices of its tokens, so a character offset never depends on the window that it comes from.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from bertqa.errors import InvalidArgument
from bertqa.plain_words import PlainWords

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

_PIECE = 2_000  # characters tokenized in one step, if the text can be cut; up to 10 ms of work
_READ = 16_384  # tokens copied out of the encoding in one step

IntArray = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Window:
    """The input of one engine call, and the position of its context tokens in the window and in the context.

    Windows of one text share memory. Copy an array before you change it.
    """

    input_ids: IntArray  # (1, length)
    attention_mask: IntArray  # (1, length), 1 for a token and 0 for padding
    token_type_ids: IntArray  # (1, length), 1 for the context and its [SEP]
    offset: int  # position of the first context token in the window
    first_token: int  # index of that token among the tokens of the context
    tokens: int  # number of context tokens in the window

    @property
    def length(self) -> int:
        """Padded length, in tokens: one of the buckets."""
        return int(self.input_ids.shape[1])

    def tensors(self) -> dict[str, IntArray]:
        """Return the engine's inputs by name, each int32 of shape (1, length)."""
        return {name: getattr(self, name) for name in INPUT_NAMES}


@dataclass(frozen=True, slots=True)
class Windows:
    """All windows of one question over one context, and the character offsets of the context tokens."""

    context: str
    windows: tuple[Window, ...]  # empty if the context has no token
    starts: IntArray  # (context tokens,), first code point of each token
    ends: IntArray  # (context tokens,), one past its last code point
    words: IntArray  # (context tokens,), number of the word that each token belongs to
    question_tokens: int  # tokens of the question before truncation
    question_truncated: bool

    def token_span(self, start: int, end: int) -> tuple[int, int] | None:
        """Return the first and last context token that overlap code points [start, end), or None if no token does."""
        first = int(np.searchsorted(self.ends, start, side="right"))
        last = int(np.searchsorted(self.starts, end, side="left")) - 1
        return (first, last) if first <= last else None


class WindowTokenizer:
    """Makes windows with one tokenizer; immutable, so threads can share an instance.

    It works on a copy of the tokenizer without truncation and padding. These are mutable state inside the Rust object;
    changing them per call makes a shared fast tokenizer fail with "Already borrowed" under concurrency.
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
        """Set the tokenizer and the limits, in tokens.

        Raises:
            InvalidArgument: a limit is out of range.
            ValueError: the tokenizer has no [CLS], [SEP] or [PAD].
        """
        self.buckets = tuple(sorted(buckets))
        if not self.buckets or self.buckets[0] < 1:
            raise InvalidArgument(("buckets",), f"must be positive lengths; got {tuple(buckets)}")
        self.max_seq_len = max_seq_len
        self.max_question_tokens = max_question_tokens
        self.overlap = overlap
        self._check_limits(max_seq_len, max_question_tokens)
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.encode_special_tokens = True  # "[SEP]" in a text is text
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._plain_ascii = _without_normalizer(self._tokenizer)
        self._cuts = _safe_cuts(self._tokenizer)
        self._words = PlainWords(self._plain_ascii) if self._plain_ascii and self._cuts else None
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
    ) -> "WindowTokenizer":
        """Load ``tokenizer.json`` from a checkpoint directory; the limits are those of the constructor.

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
        """Return the tokenizer as the text of a ``tokenizer.json``, without truncation and padding."""
        return str(self._tokenizer.to_str(pretty=False))

    def unknown_share(self, text: str) -> float:
        """Return the share of a text's tokens that are [UNK]; 0.0 for an empty text."""
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
        max_windows: int | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> Windows:
        """Tokenize a question and a context into windows.

        Args:
            question: cut after ``max_question_tokens`` tokens; the result says if it was cut.
            context: any text; one window for each ``max_seq_len - question - 3 - overlap`` of its tokens.
            overlap: context tokens that neighbouring windows share. Default: the constructor's value, or half of the
                context tokens in a window if the window is too short for that.
            max_seq_len: length of a full window; default: the constructor's value.
            max_question_tokens: default: the constructor's value, or what fits into a shorter ``max_seq_len``.
            max_windows: limit on windows, checked before any window is made.
            check: called between steps; its exceptions end the work and propagate. With the tokenizers of BERT a step
                takes a few milliseconds. Others tokenize a text in one step, without holding the GIL.

        Raises:
            InvalidArgument: a text is not valid Unicode (lone surrogates), the question has no token, a limit is out of
                range, or the context needs more than ``max_windows``. The last one names ``overlap`` if you passed it,
                else ``context``.
        """
        max_seq_len = self.max_seq_len if max_seq_len is None else max_seq_len
        if max_question_tokens is None:
            max_question_tokens = min(self.max_question_tokens, max_seq_len - SPECIAL_TOKENS - 1)
        self._check_limits(max_seq_len, max_question_tokens)
        check_unicode("question", question)
        check_unicode("context", context)
        question_ids = self._question_ids(question, check)
        kept = question_ids[:max_question_tokens]
        head = np.array([self._cls, *kept, self._sep], dtype=np.int32)
        room = max_seq_len - len(head) - 1
        shared = self._checked_overlap(overlap, room, max_seq_len)

        ids, starts, ends, words = self._tokens(context, check)
        firsts = range(0, max(len(ids) - shared, 1), room - shared) if len(ids) else range(0)
        if max_windows is not None and len(firsts) > max_windows:
            raise InvalidArgument(
                ("context" if overlap is None else "overlap",),
                f"{len(ids):,} tokens need {len(firsts):,} windows of {room} tokens with an overlap of {shared}; "
                f"at most {max_windows:,} windows are allowed",
            )
        return Windows(
            context=context,
            windows=tuple(self._windows(head, ids, firsts, room)),
            starts=starts,
            ends=ends,
            words=words,
            question_tokens=len(question_ids),
            question_truncated=len(kept) < len(question_ids),
        )

    def _question_ids(self, question: str, check: Callable[[], None]) -> IntArray:
        ids: IntArray = self._tokens(question, check)[0]
        if not len(ids):
            raise InvalidArgument(("question",), "contains no token that the model knows")
        return ids

    def _tokens(self, text: str, check: Callable[[], None]) -> IntArray:
        """Return id, start, end (in code points) and word number of a text's tokens: int32 of shape (4, tokens)."""
        tokenizer = self._tokenizer
        if self._plain_ascii is not None and not _NOT_PLAIN_ASCII.search(text):
            tokenizer, text = self._plain_ascii, text.lower()
            if self._words and len(text) <= _PIECE and (tokens := self._words.tokens(text)) is not None:
                return tokens
        parts = []
        words = 0
        for low, high in self._pieces(text):
            check()
            if len(text) <= _PIECE:
                encoding = tokenizer.encode(text, add_special_tokens=False)
            else:  # releases the GIL, unlike `encode`, but at the cost of another thread
                encoding = tokenizer.encode_batch([text[low:high]], add_special_tokens=False)[0]
            part = _read(encoding, check)
            part[1:3] += low
            part[3] += words
            words = int(part[3, -1]) + 1 if part.size else words
            parts.append(part)
        return np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]

    def _pieces(self, text: str) -> Iterator[tuple[int, int]]:
        """Yield start and end, in code points, of the pieces in which a text is tokenized."""
        low = 0
        while self._cuts and (cut := self._cuts.search(text, low + _PIECE)):
            yield low, cut.start()
            low = cut.start()
        yield low, len(text)

    def _windows(self, head: IntArray, ids: IntArray, firsts: Sequence[int], room: int) -> Iterator[Window]:
        """Yield the windows that begin at the given context tokens; all but the last are full."""
        full = len(firsts) - 1
        if full > 0:
            pieces = sliding_window_view(ids, room)[: firsts[-1] : firsts[1]]
            input_ids, attention_mask, token_type_ids = self._tensors(head, pieces)
            for number, first in enumerate(firsts[:-1]):
                row = input_ids[number : number + 1]
                yield Window(row, attention_mask, token_type_ids, len(head), first, room)
        for first in firsts[-1:]:
            yield Window(*self._tensors(head, ids[None, first:]), len(head), first, len(ids) - first)

    def _tensors(self, head: IntArray, pieces: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        """Return input ids of shape (windows, length), and the mask and token types of shape (1, length) they share."""
        used = len(head) + pieces.shape[1] + 1
        length = next(bucket for bucket in self.buckets if bucket >= used)
        input_ids = np.full((len(pieces), length), self._pad, dtype=np.int32)
        input_ids[:, : len(head)] = head
        input_ids[:, len(head) : used - 1] = pieces
        input_ids[:, used - 1] = self._sep
        attention_mask = np.zeros((1, length), dtype=np.int32)
        attention_mask[0, :used] = 1
        token_type_ids = np.zeros((1, length), dtype=np.int32)
        token_type_ids[0, len(head) : used] = 1
        return input_ids, attention_mask, token_type_ids

    def _check_limits(self, max_seq_len: int, max_question_tokens: int) -> None:
        shortest = SPECIAL_TOKENS + 2  # one token of the question and one of the context
        if not shortest <= max_seq_len <= self.buckets[-1]:
            raise InvalidArgument(
                ("max_seq_len",),
                f"must be from {shortest} to {self.buckets[-1]}, the longest bucket; got {max_seq_len!r:.40}",
            )
        if not 1 <= max_question_tokens <= max_seq_len - SPECIAL_TOKENS - 1:
            raise InvalidArgument(
                ("max_question_tokens",),
                f"must be from 1 to max_seq_len - {SPECIAL_TOKENS + 1} = "
                f"{max_seq_len - SPECIAL_TOKENS - 1}; got {max_question_tokens!r:.40}",
            )

    def _checked_overlap(self, overlap: int | None, room: int, max_seq_len: int) -> int:
        """Return the overlap for windows with ``room`` context tokens, the default if none is given."""
        if overlap is None:
            return min(self.overlap, room // 2)
        if not 0 <= overlap < room:
            raise InvalidArgument(
                ("overlap",),
                f"must be from 0 to {room - 1}, one less than the context tokens that fit next to this question "
                f"in a window of {max_seq_len}; got {overlap!r:.40}",
            )
        return overlap

    def _special(self, token: str) -> int:
        number = self._tokenizer.token_to_id(token)
        if number is None:
            raise ValueError(f"the tokenizer has no {token} token; BERT needs it")
        return int(number)


_NOT_PLAIN_ASCII = re.compile(r"[^\t\n\r -~]")


def _without_normalizer(tokenizer: Tokenizer) -> Tokenizer | None:
    """Return the tokenizer without its normalizer, a third faster on lower-cased ASCII; None if results could differ.

    BERT's uncased normalizer does nothing to printable ASCII except to lower its case, which moves no offset.
    """
    described = json.loads(tokenizer.to_str())
    normalizer = described["normalizer"] or {}
    if normalizer.get("type") != "BertNormalizer" or not normalizer.get("lowercase"):
        return None
    plain = Tokenizer.from_str(json.dumps(described | {"normalizer": None}))
    plain.encode_special_tokens = True
    return plain


def _safe_cuts(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Return a pattern of places where cutting a text changes no token, offset or word; None if there may be none.

    BERT's pre-tokenizer ends a word before white space and punctuation, and its normalizer separates ideographs. Their
    other steps, and WordPiece, look at one character or one word. The only exception is the order of combining marks,
    and none of these characters is a mark.
    """
    described = json.loads(tokenizer.to_str())
    parts = [(described[name] or {}).get("type") for name in ("normalizer", "pre_tokenizer", "model")]
    known = parts[0] in (None, "BertNormalizer") and parts[1:] == ["BertPreTokenizer", "WordPiece"]
    if not known or not all(token["special"] for token in described["added_tokens"]):
        return None
    ideographs = "\u4e00-\u9fff" if (described["normalizer"] or {}).get("handle_chinese_chars") else ""
    return re.compile(rf"[\t\n\r !-/:-@\[-`{{-~\u2010-\u2027\u2030-\u203e\u3001\u3002{ideographs}]")


def _read(encoding: Encoding, check: Callable[[], None]) -> IntArray:
    """Return id, start, end (in code points) and word number of each token: int32 of shape (4, tokens)."""
    numbers = np.empty((4, len(encoding)), dtype=np.int32)
    ids, words = encoding.ids, encoding.word_ids
    # Reads slices, and offsets one by one: building the list of all offsets of a long text holds the GIL for 0.15 s.
    # Only special tokens have no offset and no word, and there are none here.
    for low in range(0, len(encoding), _READ):
        check()
        high = min(low + _READ, len(encoding))
        offsets = chain.from_iterable(map(encoding.token_to_chars, range(low, high)))  # type: ignore[arg-type]
        numbers[0, low:high] = ids[low:high]
        numbers[1:3, low:high] = np.fromiter(offsets, np.int32, 2 * (high - low)).reshape(-1, 2).T
        numbers[3, low:high] = words[low:high]  # type: ignore[assignment]
    return numbers


def check_unicode(name: str, text: str) -> None:
    """Reject a text with lone surrogates, which UTF-8 cannot encode.

    Raises:
        InvalidArgument: the text has one; the reason gives its position.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgument((name,), f"not valid Unicode, lone surrogate at character {error.start}") from None
