"""Answers kept for who asks the same again, and one computation for all who ask it at the same time.

Bounded by bytes; what was not asked for longest goes first. Errors are never kept. A cache belongs to one version of a
model (`service.inference.registry.Served`) and goes with it, so that no version ever answers for another.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Hashable
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

V = TypeVar("V")

Source = Literal["hit", "coalesced", "miss"]
"""Where a value came from: an earlier computation, one that somebody else had begun, or one of one's own."""


class Cache(Generic[V]):
    """Values by key, of which the bytes are bounded."""

    def __init__(self, max_bytes: int, size_of: Callable[[V], int]) -> None:
        """Bound it.

        Args:
            max_bytes: of all values together; one that is larger is not kept.
            size_of: tells the bytes of a value, those of its key among them.
        """
        self.bytes = 0
        self._max_bytes = max_bytes
        self._size_of = size_of
        self._kept: OrderedDict[Hashable, tuple[V, int]] = OrderedDict()  # the one to go next comes first
        self._flights: dict[Hashable, _Flight[V]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def has(self, key: Hashable) -> bool:
        """Whether the value of a key is kept, or being computed."""
        return key in self._kept or key in self._flights

    async def get(
        self, key: Hashable, compute: Callable[[], Coroutine[Any, Any, V]], *, deadline: float
    ) -> tuple[V, Source]:
        """Give the value of a key.

        A computation ends early only when nobody waits for it any more. One that fails does so for all who wait; but
        whoever has time left when it ran out of its own begins another.

        Args:
            key: equal only for equal values.
            compute: begins the computation, whose deadline is that of whoever began it.
            deadline: `time.monotonic` seconds.

        Raises:
            TimeoutError: the deadline passed while somebody else's computation went on.
            Exception: whatever the computation raises.
        """
        while True:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key][0], "hit"
            flight = self._flights.get(key)
            mine = flight is None
            if flight is None:
                flight = self._flights[key] = _Flight(asyncio.ensure_future(self._fly(key, compute)), deadline)
                flight.task.add_done_callback(lambda task: task.cancelled() or task.exception())  # it was looked at
            try:
                return await self._join(key, flight, None if mine else deadline), "miss" if mine else "coalesced"
            except Exception:
                if mine or not flight.task.done() or not flight.deadline <= time.monotonic() < deadline:
                    raise

    async def _fly(self, key: Hashable, compute: Callable[[], Coroutine[Any, Any, V]]) -> V:
        try:
            value = await compute()
        finally:
            self._end(key, asyncio.current_task())
        size = self._size_of(value)
        if size <= self._max_bytes:
            self._kept[key] = value, size
            self.bytes += size
            while self.bytes > self._max_bytes:
                self.bytes -= self._kept.popitem(last=False)[1][1]
        return value

    async def _join(self, key: Hashable, flight: "_Flight[V]", deadline: float | None) -> V:
        flight.waiting += 1
        try:
            timeout = None if deadline is None else max(deadline - time.monotonic(), 0)
            await asyncio.wait((flight.task,), timeout=timeout)  # which leaves the task alone if we are cancelled
            if not flight.task.done():
                raise TimeoutError
            return flight.task.result()
        finally:
            flight.waiting -= 1
            if not flight.waiting and not flight.task.done():
                self._end(key, flight.task)  # nobody may join it now
                flight.task.cancel()
                await asyncio.wait((flight.task,))

    def _end(self, key: Hashable, task: "asyncio.Future[Any] | None") -> None:
        if key in self._flights and self._flights[key].task is task:
            del self._flights[key]


@dataclass(slots=True)
class _Flight(Generic[V]):
    """A computation in progress."""

    task: "asyncio.Future[V]"
    deadline: float
    waiting: int = 0  # for it
