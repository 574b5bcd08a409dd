"""Cut tokenized documents into pairs of segments for next-sentence prediction.

The procedure is that of BERT's ``create_pretraining_data.py`` (Devlin et al. 2018, appendix A.2). Consecutive sentences
fill a sequence and are cut in two at random. In half of the pairs the second segment is replaced by one from another
document, and the replaced sentences are used for the next pair. Some documents are cut into sequences of a random
shorter length, so that the model also learns from short texts.
"""

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from training.shards import Pair

SPECIAL_TOKENS = 3  # [CLS] A [SEP] B [SEP]


class Sentence(NamedTuple):
    """A tokenized sentence, of at least one token."""

    ids: NDArray[np.int32]  # (tokens,)
    word_starts: NDArray[np.bool_]  # (tokens,), whether a token begins a word


class PairMaker:
    """Cuts documents into pairs; draws from one random generator, so the order of the calls matters."""

    def __init__(
        self, *, cls_id: int, sep_id: int, max_seq_len: int, short_seq_prob: float, random: random.Random
    ) -> None:
        """Bind the recipe.

        Args:
            cls_id: the token [CLS].
            sep_id: the token [SEP].
            max_seq_len: tokens of the longest pair, special tokens included; at least 5.
            short_seq_prob: probability that a document is cut into sequences of a random shorter length.
            random: source of all random choices.
        """
        self._cls, self._sep = np.array([cls_id], dtype=np.int32), np.array([sep_id], dtype=np.int32)
        self._room = max_seq_len - SPECIAL_TOKENS
        self._short_seq_prob = short_seq_prob
        self._random = random

    def __call__(self, documents: Sequence[Sequence[Sentence]], number: int) -> Iterator[Pair]:
        """Cut one document into pairs, with random segments from the other documents.

        Args:
            documents: at least two documents, none empty.
            number: index of the document.
        """
        sentences = [piece for sentence in documents[number] for piece in self._pieces(sentence)]
        target = self._random.randint(2, self._room) if self._random.random() < self._short_seq_prob else self._room
        begin = 0
        while begin < len(sentences):
            end, tokens = begin, 0
            while end < len(sentences) and tokens < target:
                tokens += len(sentences[end].ids)
                end += 1
            cut = begin + self._random.randint(1, max(end - begin - 1, 1))
            first = _joined(sentences[begin:cut])
            if cut == end or self._random.random() < 0.5:
                second = self._random_segment(documents, number, target - len(first.ids))
                yield self._pair(first, second, is_random_next=True)
                begin = cut
            else:
                yield self._pair(first, _joined(sentences[cut:end]), is_random_next=False)
                begin = end

    def _pieces(self, sentence: Sentence) -> Iterator[Sentence]:
        """Return the sentence, or pieces of it if it is too long for any pair, so that nothing is lost."""
        for begin in range(0, len(sentence.ids), self._room):
            yield _cut(sentence, begin, begin + self._room)

    def _random_segment(self, documents: Sequence[Sequence[Sentence]], number: int, target: int) -> Sentence:
        other = self._random.randrange(len(documents) - 1)
        document = documents[other + (other >= number)]
        begin = self._random.randrange(len(document))
        end, tokens = begin + 1, len(document[begin].ids)
        while end < len(document) and tokens < target:
            tokens += len(document[end].ids)
            end += 1
        return _joined(document[begin:end])

    def _pair(self, first: Sentence, second: Sentence, *, is_random_next: bool) -> Pair:
        first, second = self._truncated(first, second)
        special = np.ones(1, dtype=bool)
        return Pair(
            input_ids=np.concatenate([self._cls, first.ids, self._sep, second.ids, self._sep]),
            word_starts=np.concatenate([special, first.word_starts, special, second.word_starts, special]),
            second=len(first.ids) + 2,
            is_random_next=is_random_next,
        )

    def _truncated(self, first: Sentence, second: Sentence) -> tuple[Sentence, Sentence]:
        """Remove tokens from the longer segment until both fit, each time at random from its front or back."""
        bounds = [[0, len(first.ids)], [0, len(second.ids)]]
        sizes = [len(first.ids), len(second.ids)]
        while sum(sizes) > self._room:
            longer = 0 if sizes[0] > sizes[1] else 1
            if self._random.random() < 0.5:
                bounds[longer][0] += 1
            else:
                bounds[longer][1] -= 1
            sizes[longer] -= 1
        return _cut(first, *bounds[0]), _cut(second, *bounds[1])


def _cut(sentence: Sentence, begin: int, end: int) -> Sentence:
    """Return some of a sentence's tokens; the rest of a split word counts as a word."""
    starts = sentence.word_starts[begin:end]
    if not starts[0]:
        starts = starts.copy()
        starts[0] = True
    return Sentence(sentence.ids[begin:end], starts)


def _joined(sentences: Sequence[Sentence]) -> Sentence:
    return Sentence(
        np.concatenate([sentence.ids for sentence in sentences]),
        np.concatenate([sentence.word_starts for sentence in sentences]),
    )
