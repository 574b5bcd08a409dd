"""A circuit breaker: after several failures in a row there are no more calls, except for a trial now and then.

Pattern and names are Nygard's (Release It!, 2nd edition 2018, section 5.2)::

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
"""Seconds between two trials, and so the longest wait for the first call of a server that is back."""
TRIAL_S = 1.0
"""Longest time, in seconds, for which a trial blocks other calls."""
SILENCE_S = 0.5
"""Seconds without a reply that count as a failure; a deadline may be shorter than any engine needs."""


class State(IntEnum):
    """State of a circuit; metrics show its number."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


class CircuitBreaker:
    """Whether calls to one server are allowed; for one event loop, without locks.

    After `allows` returns True, report the outcome of the call by exactly one of `succeeded`, `failed`, `silent` and
    `unknown`.
    """

    def __init__(self, report: Callable[[State], None] = lambda state: None) -> None:
        """Begin closed; ``report`` is called with each later state."""
        self._report = report
        self._state = State.CLOSED
        self._failures = 0
        self._failed = self._succeeded = 0.0  # when, by time.monotonic
        self._next_trial = 0.0
        self._trial_over = asyncio.Event()
        self.reason = ""
        """Sentence about the latest failure."""

    @property
    def state(self) -> State:
        """Current state."""
        return self._state

    def allows(self) -> bool:
        """Say whether a call may be made now; if the circuit is not closed, that call is the trial."""
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
        """Wait for the end of the trial in progress; returns False if the time runs out first."""
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

        Calls in progress at the same time that fail together, as those of one connection do, count as one failure.

        Args:
            sent: when the call began, in `time.monotonic` seconds.
            reason: sentence for `reason`.
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
        """Report a call without a reply before its deadline: a failure if it waited for at least `SILENCE_S`."""
        if time.monotonic() - sent >= SILENCE_S:
            self.failed(sent, reason)
        else:
            self.unknown()

    def unknown(self) -> None:
        """Report a call that proves nothing, e.g. because it was cancelled; the next call may be a trial at once."""
        if self._state is State.HALF_OPEN:
            self._next_trial = 0.0
            self._trial_over.set()

    def _become(self, state: State) -> None:
        if state is not self._state:
            self._state = state
            self._report(state)
