"""A circuit breaker: what has failed several times in a row is left alone, but for a trial now and then.

The pattern is Nygard's (Release It!, 2nd edition 2018, section 5.2) and the names are its own::

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
"""Seconds between two trials: a server that is back waits no longer than that for its first call."""
TRIAL_S = 1.0
"""Seconds that a trial keeps other calls away at most."""
SILENCE_S = 0.5
"""Seconds of silence that count as a failure; a deadline may be shorter than any engine can be."""


class State(IntEnum):
    """Of a circuit; the numbers are those of the metrics."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


class Circuit:
    """The state between this process and one other; for one event loop, without locks.

    Whoever gets True from `allows` must tell how the call went, by exactly one of the other methods.
    """

    def __init__(self, report: Callable[[State], None] = lambda state: None) -> None:
        """Begin closed; ``report`` is called with every state that follows."""
        self._report = report
        self._state = State.CLOSED
        self._failures = 0
        self._failed = self._succeeded = 0.0  # when, by time.monotonic
        self._next_trial = 0.0
        self._trial_over = asyncio.Event()
        self.reason = ""
        """The latest failure, as a sentence."""

    @property
    def state(self) -> State:
        """The state at this moment."""
        return self._state

    def allows(self) -> bool:
        """Whether a call may be made now; where the circuit is not closed, such a call is the trial."""
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
        """Wait until a trial that is under way has ended, whatever came of it; False if the time runs out."""
        try:
            await asyncio.wait_for(self._trial_over.wait(), max(timeout_s, 0))
        except asyncio.TimeoutError:
            return False
        return True

    def succeeded(self) -> None:
        """The call gave what it should."""
        self._succeeded = time.monotonic()
        self._failures = 0
        self._trial_over.set()
        self._become(State.CLOSED)

    def failed(self, sent: float, reason: str) -> None:
        """The call, sent at that moment by `time.monotonic`, failed.

        Calls that were under way together and fail together, as those of one connection do, are one failure.
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
        """The call, sent at that moment, got no answer in its time: a failure if nobody got one and it was long."""
        if time.monotonic() - sent >= SILENCE_S:
            self.failed(sent, reason)
        else:
            self.unknown()

    def unknown(self) -> None:
        """The call says nothing about the other side, e.g. because it was cancelled; a trial may follow at once."""
        if self._state is State.HALF_OPEN:
            self._next_trial = 0.0
            self._trial_over.set()

    def _become(self, state: State) -> None:
        if state is not self._state:
            self._state = state
            self._report(state)
