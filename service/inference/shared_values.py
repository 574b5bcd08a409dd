"""A cache with a byte limit, where concurrent callers for one key share its computation."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Hashable
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

V = TypeVar("V")

Source = Literal["hit", "coalesced", "miss"]
"""Where a value came from: the cache, a computation that another caller started, or the caller's own."""


class SharedValues(Generic[V]):
    """Values by key, with a byte limit; drops the least recently used first. Errors are not kept."""

    def __init__(self, max_bytes: int, size_of: Callable[[V], int]) -> None:
        """Begin empty.

        Args:
            max_bytes: limit on all values together; a larger value is not kept.
            size_of: returns the bytes of a value and its key.
        """
        self.bytes = 0
        self._max_bytes = max_bytes
        self._size_of = size_of
        self._kept: OrderedDict[Hashable, tuple[V, int]] = OrderedDict()  # least recently used first
        self._flights: dict[Hashable, _Flight[V]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def has(self, key: Hashable) -> bool:
        """Return whether a value is kept or being computed."""
        return key in self._kept or key in self._flights

    async def get(
        self, key: Hashable, compute: Callable[[], Coroutine[Any, Any, V]], *, deadline: float
    ) -> tuple[V, Source]:
        """Return the value of a key and where it came from.

        A computation is cancelled when no caller waits for it any more. If it fails, it fails for all its callers. But
        if the first caller's deadline ends the computation, a waiter with time left restarts it.

        Args:
            key: equal only for equal values.
            compute: computes the value within this caller's deadline.
            deadline: in `time.monotonic` seconds.

        Raises:
            TimeoutError: the deadline passed during another caller's computation.
            Exception: any error of the computation.
        """
        while True:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key][0], "hit"
            flight = self._flights.get(key)
            mine = flight is None
            if flight is None:
                flight = self._flights[key] = _Flight(asyncio.ensure_future(self._fly(key, compute)), deadline)
                flight.task.add_done_callback(
                    lambda task: task.cancelled() or task.exception()
                )  # asyncio reports errors not looked at
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
            await asyncio.wait((flight.task,), timeout=timeout)  # does not cancel the task if we are cancelled
            if not flight.task.done():
                raise TimeoutError
            return flight.task.result()
        finally:
            flight.waiting -= 1
            if not flight.waiting and not flight.task.done():
                self._end(key, flight.task)  # so that no other caller joins it
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
    waiting: int = 0  # callers
