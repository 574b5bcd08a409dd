"""Admit calls to an engine: one queue for each version of a model, fair between the calls of clients.

A *call* is the work of one HTTP request, with one question or many. A call waits for its first turn at the engine for
at most `max_wait_s`, and no longer than its deadline. It is rejected at once if its first turn is not expected in that
time. All waiting calls take turns, round robin.

With ``slots`` concurrent engine calls of ``call_s`` seconds each, a slot becomes free every ``call_s / slots`` seconds.
Triton computes half of the slots while the other half is in its queue. A new call is computed after the engine calls in
progress and one turn of each call that is waiting or being tokenized::

    expected wait = (engine calls sent + calls waiting + calls being tokenized + 1 - slots / 2) * call_s / slots
"""

import math
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from service.inference.fair_queue import FairQueue
from service.triton.errors import EngineError, EngineOverloaded, EngineTimeout

SLOTS_AT_FIRST = 4
"""Concurrent engine calls until the server has reported how many it computes."""
_WEIGHT = 1 / 16  # lowest weight of the latest engine call in the mean: covers about thirty calls


@dataclass(slots=True, eq=False)
class Call:
    """The work of one HTTP request; it owns its turns in the queue."""

    deadline: float  # `time.monotonic` seconds
    came: float = field(init=False)
    has_begun: bool = False  # it had its first turn

    def __post_init__(self) -> None:
        self.came = time.monotonic()


class Admission:
    """Limits the engine calls of one version of a model; for one event loop, without locks."""

    def __init__(self, max_wait_s: float, slots: int = 0) -> None:
        """Begin without knowledge of the engine.

        Args:
            max_wait_s: how long a call may wait for its first turn.
            slots: concurrent engine calls; 0: set by `resize`.
        """
        self.max_wait_s = max_wait_s
        self.call_s = 0.0
        """Moving average of the seconds of engine calls that began while all slots were taken; 0.0 before the first.
        By Little's law this is ``slots`` times the time between two turns. Other calls take less."""
        self.answered_at = -math.inf
        """When an engine call last succeeded, in `time.monotonic` seconds."""
        self._fixed = bool(slots)
        self._queue = FairQueue(slots or SLOTS_AT_FIRST)
        self._seen = 0  # calls in that average
        self._arriving = 0  # calls being tokenized, which will then ask for their first slot

    @property
    def slots(self) -> int:
        """Limit on concurrent engine calls."""
        return self._queue.slots

    @property
    def busy(self) -> int:
        """Engine calls in progress."""
        return self._queue.busy

    def resize(self, slots: int) -> None:
        """Set the limit on concurrent engine calls, unless the constructor did."""
        if not self._fixed:
            self._queue.resize(slots)

    def expected_wait(self, besides: int = 0) -> float:
        """Return the seconds until a new call would be computed, with ``besides`` more calls ahead than are queued."""
        ahead = self._queue.busy + self._queue.owners_waiting + self._arriving + besides
        computed = (self.slots + 1) // 2
        return max(ahead + 1 - computed, 0) * self.call_s / self.slots

    def check(self, deadline: float = math.inf, *, besides: int = 0) -> None:
        """Check that a new call can expect its first turn in time.

        Raises:
            EngineOverloaded: it cannot; ``retry_after_s`` says when it could.
        """
        wait_s = self.expected_wait(besides)
        bound_s = max(min(self.max_wait_s, deadline - time.monotonic()), 0)
        if wait_s > bound_s:
            raise EngineOverloaded(
                f"The engine is busy: this request would wait {wait_s:.2f} s for its turn; the limit is "
                f"{bound_s:.2f} s.",
                retry_after_s=wait_s - bound_s,
            )

    @contextmanager
    def arriving(self) -> Iterator[None]:
        """Count an admitted call until it asks for its first slot."""
        self._arriving += 1
        try:
            yield
        finally:
            self._arriving -= 1

    @asynccontextmanager
    async def slot(self, call: Call) -> AsyncIterator[None]:
        """Wait for the call's turn and hold a slot for one engine call.

        Raises:
            EngineTimeout: the call's deadline passed.
            EngineOverloaded: its first turn did not come within `max_wait_s`.
        """
        await self._take(call)
        began, is_full = time.monotonic(), self._queue.busy >= self.slots
        try:
            yield
            self.answered_at = time.monotonic()
            if is_full:
                self._measured(self.answered_at - began)
        except EngineError:
            self.answered_at = -math.inf
            raise
        finally:
            self._queue.give_back()

    async def _take(self, call: Call) -> None:
        while True:
            first_turn_by = math.inf if call.has_begun else call.came + self.max_wait_s
            try:
                await self._queue.take(call, min(call.deadline, first_turn_by))
            except TimeoutError:
                if call.deadline <= time.monotonic() or call.deadline <= first_turn_by:
                    raise EngineTimeout("The deadline passed while waiting for a free slot at the engine.") from None
                if call.has_begun:  # another of its windows
                    continue
                raise EngineOverloaded(
                    f"The engine became slower: this request got no turn within {self.max_wait_s:g} s.",
                    retry_after_s=max(self.expected_wait() - self.max_wait_s, 0),
                ) from None
            call.has_begun = True
            return

    def _measured(self, seconds: float) -> None:
        self._seen += 1
        self.call_s += (seconds - self.call_s) * max(_WEIGHT, 1 / self._seen)
