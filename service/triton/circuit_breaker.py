"""A circuit breaker: after several failures in a row it blocks calls, except for a trial now and then.

The pattern and its names come from Nygard (Release It!, 2nd edition 2018, section 5.2)::

    closed ── failures in a row ──▶ open ── a pause ──▶ half-open ── success ──▶ closed
                                      ▲                     │
                                      └────── failure ──────┘
"""

import asyncio
import time
from collections.abc import Callable
from enum import IntEnum

FAILURES = 5
"""Failures in a row that open a circuit."""
PAUSE_S = 0.25
"""Seconds between two trials, and so the longest time until a recovered server is called."""
TRIAL_S = 1.0
"""Longest time in seconds for which a trial blocks other calls."""
SILENCE_S = 0.5
"""Seconds without a reply that count as a failure; after a shorter deadline, silence proves nothing."""


class State(IntEnum):
    """State of a circuit breaker; metrics show its number."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


class CircuitBreaker:
    """Decides whether calls to one server are allowed; for one event loop, without locks.

    After `allows` returns True, report the outcome of the call with exactly one of `succeeded`, `failed`, `silent` and
    `unknown`.
    """

    def __init__(self, report: Callable[[State], None] = lambda state: None) -> None:
        """Start closed; ``report`` is called with each later state."""
        self._report = report
        self._state = State.CLOSED
        self._failures = 0
        self._failed = self._succeeded = 0.0  # times of time.monotonic
        self._next_trial = 0.0
        self._trial_over = asyncio.Event()
        self.reason = ""
        """A sentence about the latest failure."""

    @property
    def state(self) -> State:
        """Current state."""
        return self._state

    def allows(self) -> bool:
        """Return whether to make a call now; unless the circuit is closed, that call is the trial."""
        if self._state is State.CLOSED:
            return True
        now = time.monotonic()
        if now < self._next_trial:
            return False
        self._next_trial = now + TRIAL_S
        self._trial_over.clear()
        self._become(State.HALF_OPEN)
        return True

    async def trial_ends(self, timeout_s: float) -> bool:
        """Wait for the end of the trial in progress; returns False after the timeout."""
        try:
            await asyncio.wait_for(self._trial_over.wait(), max(timeout_s, 0))
        except asyncio.TimeoutError:
            return False
        return True

    def succeeded(self) -> None:
        """Report a call with a usable reply."""
        self._succeeded = time.monotonic()
        self._failures = 0
        self._trial_over.set()
        self._become(State.CLOSED)

    def failed(self, sent: float, reason: str) -> None:
        """Report a call that failed.

        Concurrent calls that fail together, such as those of one broken connection, count as one failure.

        Args:
            sent: start of the call, in `time.monotonic` seconds.
            reason: a sentence for `reason`.
        """
        if sent < max(self._failed, self._succeeded):
            return
        self._failed = time.monotonic()
        self._failures += 1
        self.reason = reason
        if self._state is not State.CLOSED or self._failures >= FAILURES:
            self._next_trial = self._failed + PAUSE_S
            self._trial_over.set()
            self._become(State.OPEN)

    def silent(self, sent: float, reason: str) -> None:
        """Report a call that got no reply by its deadline; it is a failure if it waited for at least `SILENCE_S`."""
        if time.monotonic() - sent >= SILENCE_S:
            self.failed(sent, reason)
        else:
            self.unknown()

    def unknown(self) -> None:
        """Report a call that proves nothing, e.g. a cancelled one; the next call may be a trial immediately."""
        if self._state is State.HALF_OPEN:
            self._next_trial = 0.0
            self._trial_over.set()

    def _become(self, state: State) -> None:
        if state is not self._state:
            self._state = state
            self._report(state)
