"""Who may ask an engine, and when: one queue for each version of a model, fair between clients' calls.

A *call* is what one HTTP request asks, be it one question or many. A call waits for its first turn at the engine as
long as `max_wait_s` and its own deadline allow, and nothing is refused while it can be expected to get it in that time.
From then on turns go round all calls that wait.

With ``slots`` engine calls at one time, of ``call_s`` seconds each, one slot becomes free every ``call_s / slots``.
Half of the slots are being computed, the other half lies ready in Triton's queue. A newcomer is computed after the
engine calls that were sent, and one turn of each call that waits or is being tokenized::

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
"""Engine calls at one time before the server has said how many it computes."""
_WEIGHT = 1 / 16  # at least, of the latest engine call in the mean: that of the last thirty or so


@dataclass(slots=True, eq=False)
class Call:
    """What one HTTP request asks: the owner of its turns."""

    deadline: float  # `time.monotonic` seconds
    came: float = field(init=False)
    has_begun: bool = False  # it has had a turn

    def __post_init__(self) -> None:
        self.came = time.monotonic()


class Admission:
    """The engine calls of one version of a model; for one event loop, without locks."""

    def __init__(self, max_wait_s: float, slots: int = 0) -> None:
        """Begin with nothing known of the engine.

        Args:
            max_wait_s: how long a call may wait for its first turn.
            slots: engine calls at one time; 0: as many as `resize` says.
        """
        self.max_wait_s = max_wait_s
        self.call_s = 0.0
        """Mean seconds of an engine call that began with all slots taken, the latest counting most; 0.0 before the
        first. By Little's law it is ``slots`` times the pause between two turns; of other calls it is less."""
        self.answered_at = -math.inf
        """When an engine call last succeeded, in `time.monotonic` seconds."""
        self._fixed = bool(slots)
        self._queue = FairQueue(slots or SLOTS_AT_FIRST)
        self._seen = 0  # calls in that mean
        self._arriving = 0  # calls that will ask for their first slot when they are tokenized

    @property
    def slots(self) -> int:
        """Engine calls that may be in progress at one time."""
        return self._queue.slots

    @property
    def busy(self) -> int:
        """Engine calls in progress."""
        return self._queue.busy

    def resize(self, slots: int) -> None:
        """Take over how many calls the engine is to have at one time, unless that was set."""
        if not self._fixed:
            self._queue.resize(slots)

    def expected_wait(self, besides: int = 0) -> float:
        """Seconds until a call that comes now is computed, behind ``besides`` more than the queue knows."""
        ahead = self._queue.busy + self._queue.owners_waiting + self._arriving + besides
        computed = (self.slots + 1) // 2
        return max(ahead + 1 - computed, 0) * self.call_s / self.slots

    def check(self, deadline: float = math.inf, *, besides: int = 0) -> None:
        """Return if a call that comes now can be expected to get its first turn in time.

        Raises:
            EngineOverloaded: it cannot; it says when it could.
        """
        wait_s = self.expected_wait(besides)
        bound_s = max(min(self.max_wait_s, deadline - time.monotonic()), 0)
        if wait_s > bound_s:
            raise EngineOverloaded(
                f"The engine is busy: this would wait {wait_s:.2f} s for its turn, and may wait {bound_s:.2f} s.",
                retry_after_s=wait_s - bound_s,
            )

    @contextmanager
    def arriving(self) -> Iterator[None]:
        """Count a call that has been admitted, until it asks for its first slot."""
        self._arriving += 1
        try:
            yield
        finally:
            self._arriving -= 1

    @asynccontextmanager
    async def slot(self, call: Call) -> AsyncIterator[None]:
        """Wait for the call's turn, and hold a slot for one engine call.

        Raises:
            EngineTimeout: the call's deadline passed first.
            EngineOverloaded: its first turn did not come within the bound.
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
                if call.has_begun:  # with another of its windows
                    continue
                raise EngineOverloaded(
                    f"The engine is slower than it was: no turn came within {self.max_wait_s:g} s.",
                    retry_after_s=max(self.expected_wait() - self.max_wait_s, 0),
                ) from None
            call.has_begun = True
            return

    def _measured(self, seconds: float) -> None:
        self._seen += 1
        self.call_s += (seconds - self.call_s) * max(_WEIGHT, 1 / self._seen)
