"""Compute a step's global batch as a pure function of the step, and pack short sequences into rows."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class Batches:
    """The global batches of a run: a function from the step to the indexes of its sequences, in order of length.

    Each epoch has a new random order. Pools of ``pool`` batches are sorted by length before they are cut into batches,
    so that there is little padding and the order is still random. Sequences left over at the end of an epoch, fewer
    than a batch, are dropped. A resumed run and every process get the same batches.
    """

    def __init__(
        self,
        lengths: Sequence[int] | NDArray[np.integer],
        batch_size: int,
        *,
        seed: int,
        pool: int = 64,
        block: int = 1,
        by_length: bool = True,
    ) -> None:
        """Bind the sequences and the recipe.

        Args:
            lengths: of all sequences, in tokens.
            batch_size: sequences in a global batch.
            seed: seed of the order.
            pool: number of batches that are sorted by length together.
            block: number of consecutive sequences that stay in one pool if they fit; for sequences that are read from
                disk in blocks, so that a pool reads few blocks. Within the pool they are still shuffled.
            by_length: whether pools are sorted by length; sequences that are packed into rows need no sorting.

        Raises:
            ValueError: there are fewer sequences than one batch needs.
        """
        self._lengths = np.asarray(lengths)
        if len(self._lengths) < batch_size:
            raise ValueError(f"{len(self._lengths)} sequences are fewer than one batch of {batch_size}")
        self._batch_size, self._seed, self._block, self._by_length = batch_size, seed, block, by_length
        self._pool = pool
        self._pooled: tuple[tuple[int, int], NDArray[np.int64]] | None = None  # (epoch, pool) and its batches

    @property
    def per_epoch(self) -> int:
        """Number of steps in one pass over the sequences."""
        return len(self._lengths) // self._batch_size

    def epoch(self, step: int) -> int:
        """Return the epoch of a step, from 0."""
        return step // self.per_epoch

    def __call__(self, step: int) -> list[int]:
        """Return the indexes of a step's global batch."""
        epoch, batch = divmod(step, self.per_epoch)
        number, place = divmod(batch, self._pool)
        if self._pooled is None or self._pooled[0] != (epoch, number):
            self._pooled = (epoch, number), self._batches_of(epoch, number)
        indexes: list[int] = self._pooled[1][place].tolist()
        return indexes

    def _batches_of(self, epoch: int, number: int) -> NDArray[np.int64]:
        """Return the batches of one pool, (batches, batch size)."""
        size, total = self._pool * self._batch_size, len(self._lengths)
        blocks = np.random.default_rng([self._seed, epoch]).permutation(-(-total // self._block))
        ends = np.cumsum(np.minimum(self._block, total - blocks * self._block))
        begin, end = number * size, min((number + 1) * size, total)
        first, last = np.searchsorted(ends, [begin, end - 1], side="right")
        taken = blocks[first : last + 1]
        indexes = np.concatenate([np.arange(at * self._block, min((at + 1) * self._block, total)) for at in taken])
        skipped = begin - (ends[first - 1] if first else 0)
        chooser = np.random.default_rng([self._seed, epoch, number + 1])
        order: NDArray[np.int64] = chooser.permutation(indexes[skipped : skipped + end - begin])
        order = order[: len(order) // self._batch_size * self._batch_size]
        if not self._by_length:
            return order.reshape(-1, self._batch_size)
        order = order[np.argsort(self._lengths[order], kind="stable")].reshape(-1, self._batch_size)
        return chooser.permutation(order)


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack whole sequences into rows of ``capacity`` tokens by best-fit decreasing.

    Each sequence goes to the fullest row that still has room for it, or to a new row. This uses at most 11/9 of the
    smallest possible number of rows, plus a constant (Johnson 1973).

    Returns:
        The indexes of each row's sequences; every index occurs once.

    Raises:
        ValueError: a sequence is longer than a row.
    """
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # free tokens -> rows
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[index]
        if length > capacity:
            raise ValueError(f"a sequence of {length} tokens does not fit into a row of {capacity}")
        free = next((free for free in range(length, capacity) if open_rows.get(free)), None)
        if free is None:
            free = capacity
            rows.append([])
            row = len(rows) - 1
        else:
            row = open_rows[free].pop()
        rows[row].append(index)
        open_rows.setdefault(free - length, []).append(row)
    return rows
