"""Make batches for masked language modelling and next-sentence prediction (Devlin et al. 2018, section 3.1).

Masks are drawn when a pair is read, and anew in every epoch: whole words with 15 % of the tokens, of which 80 % become
[MASK], 10 % another token, and 10 % stay. Masks are a pure function of seed, epoch and row, so that a resumed run and
every process draw the same. The masked tokens are gathered, so that the head computes only them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from training.batches import Batches, pack
from training.shards import GROUP_ROWS, Pair, ShardManifest, ShardSet

MASKED_SHARE = 0.15
"""Share of masked tokens in a sequence, special tokens included."""


class Item(NamedTuple):
    """A sequence of a global batch: its row, and which of its maskings."""

    epoch: int
    row: int


@dataclass(frozen=True, slots=True)
class Masked:
    """A pair with some of its tokens masked."""

    pair: Pair
    input_ids: NDArray[np.int32]  # (tokens,), masked
    positions: NDArray[np.int64]  # (masked tokens,), ascending
    labels: NDArray[np.int32]  # (masked tokens,), the original tokens


@dataclass(frozen=True, slots=True)
class MaskedBatch:
    """Sequences in rows of one length; int64 tensors. A flat index is an index into the concatenated rows.

    Without packing, a row has one sequence. With packing it has several. The positions of each begin at 0, and they
    must not attend to each other: see `block_diagonal`.
    """

    input_ids: torch.Tensor  # (rows, length)
    attention_mask: torch.Tensor  # (rows, length), 1 for a token and 0 for padding
    token_type_ids: torch.Tensor  # (rows, length), 1 for B and its [SEP]
    position_ids: torch.Tensor  # (rows, length), of a token in its own sequence
    sequence_ids: torch.Tensor  # (rows, length), number of the token's sequence in its row, from 1; 0 for padding
    first_tokens: torch.Tensor  # (sequences,), flat index of each [CLS]
    next_sentence: torch.Tensor  # (sequences,), 1 where B is from another document, 0 where it follows A
    masked_positions: torch.Tensor  # (masked tokens,), flat index of each masked token
    labels: torch.Tensor  # (masked tokens,), the original token
    lengths: tuple[int, ...]  # (sequences,), tokens of each


class Masker:
    """Masks whole words of a pair, as a pure function of the seed, the epoch and the row."""

    def __init__(self, *, mask_id: int, replacements: NDArray[np.int32], max_predictions: int, seed: int) -> None:
        """Bind the vocabulary and the recipe.

        Args:
            mask_id: the token [MASK].
            replacements: (tokens,), tokens that may replace another: all but the special tokens.
            max_predictions: most masked tokens of a sequence; at least 1.
            seed: seed of the masks, from 0 to 2**64 - 1.
        """
        self._mask_id, self._replacements = mask_id, replacements
        self._max_predictions, self._seed = max_predictions, seed

    @classmethod
    def of(cls, manifest: ShardManifest, seed: int) -> "Masker":
        """Create the masker for a shard set."""
        special = list(manifest.special_tokens.values())
        return cls(
            mask_id=manifest.special_tokens["[MASK]"],
            replacements=np.setdiff1d(np.arange(manifest.vocab_size, dtype=np.int32), special),
            max_predictions=manifest.max_predictions_per_seq,
            seed=seed,
        )

    def __call__(self, pair: Pair, item: Item) -> Masked:
        """Mask as many whole words of a pair as fit into the number of tokens to mask, and at least one token."""
        # Counter-based: the stream is a function of key and counter, and creating one needs no hashing of a seed.
        random = np.random.Generator(np.random.Philox(key=self._seed, counter=[0, 0, item.epoch, item.row]))
        tokens = len(pair.input_ids)
        wanted = min(self._max_predictions, max(1, round(tokens * MASKED_SHARE)))
        positions = _chosen(pair, wanted, random)
        labels = pair.input_ids[positions]
        fate = random.random(len(positions))
        others = self._replacements[random.integers(len(self._replacements), size=len(positions))]
        input_ids = pair.input_ids.copy()
        input_ids[positions] = np.where(fate < 0.8, self._mask_id, np.where(fate < 0.9, labels, others))
        return Masked(pair, input_ids, positions, labels)


def _chosen(pair: Pair, wanted: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Positions of ``wanted`` tokens at most, of whole words in random order; a word that is too long is skipped."""
    starts = np.flatnonzero(pair.word_starts)
    sizes = np.diff(starts, append=len(pair.input_ids))
    special = np.isin(starts, (0, pair.second - 1, len(pair.input_ids) - 1))  # [CLS] and both [SEP]
    words = random.permutation(np.flatnonzero(~special))
    positions: list[int] = []
    for start, size in zip(starts[words].tolist(), sizes[words].tolist(), strict=True):
        if len(positions) + size <= wanted:
            positions.extend(range(start, start + size))
            if len(positions) == wanted:
                break
    if not positions:  # all words have more tokens than may be masked
        start = int(starts[words[0]])
        positions.extend(range(start, start + wanted))
    return np.array(sorted(positions), dtype=np.int64)


class MaskedPairs:
    """The batches of a run over a shard set: provides the items of `training.loop` and collates them."""

    def __init__(self, shards: ShardSet, *, batch_size: int, seed: int, packed: bool = False) -> None:
        """Bind a shard set.

        Args:
            shards: shard set to read from.
            batch_size: number of sequences in a global batch.
            seed: seed of order and masks.
            packed: put several sequences into each row, up to the set's ``max_seq_len`` tokens, instead of batches of
                similar length.

        Raises:
            ValueError: the set has fewer sequences than one batch.
        """
        self._shards = shards
        self._mask = Masker.of(shards.manifest, seed)
        self._row_tokens = shards.manifest.max_seq_len if packed else None
        self._pad_id = shards.manifest.special_tokens["[PAD]"]
        self._batches = Batches(shards.lengths, batch_size, seed=seed, block=GROUP_ROWS, by_length=not packed)

    @property
    def per_epoch(self) -> int:
        """Number of steps in one pass over the set."""
        return self._batches.per_epoch

    def items(self, step: int) -> list[Item]:
        """Return the global batch of a step."""
        epoch = self._batches.epoch(step)
        return [Item(epoch, row) for row in self._batches(step)]

    def collate(self, items: Sequence[Item]) -> MaskedBatch:
        """Read, mask and lay out some sequences.

        Raises:
            ShardError: a shard cannot be read.
        """
        masked = [self._mask(self._shards[item.row], item) for item in items]
        return collate(masked, row_tokens=self._row_tokens, pad_id=self._pad_id)


def collate(
    sequences: Sequence[Masked], *, row_tokens: int | None = None, multiple: int = 8, pad_id: int = 0
) -> MaskedBatch:
    """Lay out sequences in rows.

    Args:
        sequences: at least one sequence; without packing they keep their order, one per row.
        row_tokens: pack the sequences into rows of this many tokens; None gives each its own row, as long as the
            longest.
        multiple: round the length of rows up to a multiple of this.
        pad_id: the token [PAD].

    Raises:
        ValueError: a sequence is longer than ``row_tokens``.
    """
    lengths = [len(sequence.input_ids) for sequence in sequences]
    rows = pack(lengths, row_tokens) if row_tokens else [[index] for index in range(len(sequences))]
    longest = max(sum(lengths[index] for index in row) for row in rows)
    length = -(-longest // multiple) * multiple
    input_ids = np.full((len(rows), length), pad_id, dtype=np.int64)
    token_type_ids, position_ids, sequence_ids = (np.zeros_like(input_ids) for _ in range(3))
    first_tokens, next_sentence, masked_positions, labels, ordered = [], [], [], [], []
    for row, members in enumerate(rows):
        begin = 0
        for number, index in enumerate(members, 1):
            sequence, end = sequences[index], begin + lengths[index]
            input_ids[row, begin:end] = sequence.input_ids
            token_type_ids[row, begin + sequence.pair.second : end] = 1
            position_ids[row, begin:end] = np.arange(end - begin)
            sequence_ids[row, begin:end] = number
            first_tokens.append(row * length + begin)
            next_sentence.append(int(sequence.pair.is_random_next))
            masked_positions.append(row * length + begin + sequence.positions)
            labels.append(sequence.labels)
            ordered.append(lengths[index])
            begin = end
    return MaskedBatch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy((sequence_ids > 0).astype(np.int64)),
        token_type_ids=torch.from_numpy(token_type_ids),
        position_ids=torch.from_numpy(position_ids),
        sequence_ids=torch.from_numpy(sequence_ids),
        first_tokens=torch.tensor(first_tokens),
        next_sentence=torch.tensor(next_sentence),
        masked_positions=torch.from_numpy(np.concatenate(masked_positions)),
        labels=torch.from_numpy(np.concatenate(labels).astype(np.int64)),
        lengths=tuple(ordered),
    )


def block_diagonal(sequence_ids: torch.Tensor) -> torch.Tensor:
    """Build the attention mask with which tokens attend only to their own sequence.

    Padding attends to padding, so that no row of the softmax is empty; its output is never read.

    Args:
        sequence_ids: (rows, length), from a `MaskedBatch`.

    Returns:
        bool of shape (rows, 1, length, length), true where attention is allowed.
    """
    return (sequence_ids[:, None, :, None] == sequence_ids[:, None, None, :]).contiguous()
