"""Question and context -> token windows -> the best span: what every server here needs around a network.

The Hugging Face pipeline has its own. Windows of 384 tokens that overlap by 128, answers of up to 30 tokens, whole
words: the same limits as ours.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

CHECKPOINT = Path(os.environ.get("CHECKPOINT", "checkpoints/minilm-l6-squad"))
MAX_ANSWER_TOKENS = 30

Array = NDArray[Any]
Predict = Callable[[Array, Array, Array], tuple[Array, Array]]
"""input_ids, attention_mask, token_type_ids, int64 of shape (rows, length), to start and end logits of that shape."""


class Reader:
    """Answers questions with any network."""

    def __init__(self, predict: Predict, checkpoint: Path = CHECKPOINT) -> None:
        self._predict = predict
        self._tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
        self._tokenizer.enable_truncation(384, stride=128, strategy="only_second")

    def read(self, questions: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
        """Answer pairs of question and context; all of their windows go through the network as one padded batch."""
        encodings = self._tokenizer.encode_batch([tuple(pair) for pair in questions])
        windows = [(n, window) for n, first in enumerate(encodings) for window in (first, *first.overflowing)]
        shape = len(windows), max(len(window.ids) for _, window in windows)
        input_ids, attention_mask, token_type_ids = (np.zeros(shape, np.int64) for _ in range(3))
        for row, (_, window) in enumerate(windows):
            length = len(window.ids)
            input_ids[row, :length] = window.ids
            attention_mask[row, :length] = 1
            token_type_ids[row, :length] = window.type_ids
        start_logits, end_logits = self._predict(input_ids, attention_mask, token_type_ids)
        answers: list[dict[str, Any]] = [{"score": -np.inf} for _ in questions]
        for row, (n, window) in enumerate(windows):
            score, start, end = _best_span(window, start_logits[row], end_logits[row])
            if score > answers[n]["score"]:
                answers[n] = {"answer": questions[n][1][start:end], "start": start, "end": end, "score": score}
        return answers


def _best_span(window: Encoding, start_logits: Array, end_logits: Array) -> tuple[float, int, int]:
    """Score of the best span of context tokens, and its first and one-past-last character."""
    context = [n for n, sequence in enumerate(window.sequence_ids) if sequence == 1]
    first, last = context[0], context[-1] + 1
    sums = start_logits[first:last, None] + end_logits[None, first:last]
    sums[~_allowed(last - first)] = -np.inf
    start, end = divmod(int(sums.argmax()), last - first)
    first_word, last_word = (window.word_ids[first + token] for token in (start, end))
    characters: Any = window.word_to_chars
    return float(sums[start, end]), characters(first_word, 1)[0], characters(last_word, 1)[1]


def _allowed(length: int) -> Array:
    """Whether a span from token i to token j is one: not backwards, not too long."""
    ones = np.ones((length, length), bool)
    return np.triu(ones) & np.tril(ones, MAX_ANSWER_TOKENS - 1)
