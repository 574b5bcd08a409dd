"""Which calls may be made twice because the first got no reply in time, so that this never adds much to a load.

A hedged request (Dean and Barroso, The Tail at Scale, 2013): a second call goes to another replica, the first reply
counts, and the other call is cancelled. Done without measure it doubles the load just when replicas are slow because of
it; hence a budget, and none at all after one has said that it has too much.
"""

import time
from collections.abc import Callable

SHARE = 0.05
"""Of all calls that may be made twice."""
SAVED = 10
"""Second calls that the budget holds at most, and at first: those of a replica that hangs come all together."""
TRUCE_S = 1.0
"""Seconds without second calls after a replica has refused one because its queue is full."""


class Hedging:
    """When to make second calls, and what became of them; for one event loop, without locks."""

    def __init__(self, after_s: float = 0.0, count: Callable[[str], object] = lambda outcome: None) -> None:
        """Begin with a full budget.

        Args:
            after_s: seconds without a reply until a second call is made; 0: never.
            count: called with the outcome of each second call: ``won``, ``lost`` to the first one, ``failed`` like the
                first one, ``cancelled`` with it; and with ``withheld`` for one that the budget did not allow.
        """
        self.after_s = after_s
        self.count = count
        self._budget = float(SAVED)
        self._overloaded = -TRUCE_S  # when, by time.monotonic

    def called(self) -> None:
        """A first call is made."""
        self._budget = min(self._budget + SHARE, SAVED)

    def overloaded(self) -> None:
        """A replica has refused a call because it has too much."""
        self._overloaded = time.monotonic()

    def allows(self) -> bool:
        """Whether a second call may be made now, which then counts."""
        if self._budget < 1 or time.monotonic() - self._overloaded < TRUCE_S:
            self.count("withheld")
            return False
        self._budget -= 1
        return True
