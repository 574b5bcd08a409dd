"""Which calls may be made twice because the first got no reply in time, so that this never adds much to a load.

A hedged request (Dean and Barroso, The Tail at Scale, 2013): a second call goes to another replica, the first reply
counts, and the other call is cancelled. Done without measure it doubles the load just when replicas are slow because of
it; hence a budget, and none at all after one has said that it has too much.
"""

import time
from collections.abc import Callable

from service.circuit import FAILURES

SHARE = 0.05
"""Of all calls that may be made twice."""
TRUCE_S = 1.0
"""Seconds without second calls after a replica has refused one because its queue is full."""


def saved(places: int) -> int:
    """Second calls beyond the share, where so many calls may be in progress at one time.

    A replica that hangs soon has them all, and when it has had them five times over, its circuit is open.
    """
    return FAILURES * places


class Hedging:
    """When to make second calls, and what became of them; for one event loop, without locks."""

    def __init__(self, after_s: float = 0.0, count: Callable[[str], object] = lambda outcome: None) -> None:
        """Begin with nothing spent.

        Args:
            after_s: seconds without a reply until a second call is made; 0: never.
            count: called with the outcome of each second call: ``won``, ``lost`` to the first one, ``failed`` like the
                first one, ``cancelled`` with it; and with ``withheld`` for one that was not allowed.
        """
        self.after_s = after_s
        self.count = count
        self._spent = 0.0  # of what is saved
        self._overloaded = -TRUCE_S  # when, by time.monotonic

    def called(self) -> None:
        """A first call is made."""
        self._spent = max(self._spent - SHARE, 0)

    def overloaded(self) -> None:
        """A replica has refused a call because it has too much."""
        self._overloaded = time.monotonic()

    def allows(self, places: int) -> bool:
        """Whether a second call may be made now, which then counts, where so many may be in progress at one time."""
        if self._spent + 1 > saved(places) or time.monotonic() - self._overloaded < TRUCE_S:
            self.count("withheld")
            return False
        self._spent += 1
        return True
