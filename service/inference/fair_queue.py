"""A bound on the engine calls in progress, and turns that go round whoever waits.

What an engine's server has been sent can no longer be overtaken, so it is sent only what keeps it busy. The rest waits
here. A slot that becomes free goes to the owner who has waited longest since its last turn: one with hundreds of calls
and one with a single call advance alike.
"""

import asyncio
import time
from collections import OrderedDict, deque


class FairQueue:
    """Slots handed out round robin over their owners, with a deadline for each that waits.

    `asyncio.Semaphore` knows no owners and no deadline, and around it `asyncio.wait_for` can lose a turn when time runs
    out just as it comes (before Python 3.12).
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        """Calls that may be in progress at one time."""
        self.busy = 0
        """Calls in progress."""
        self._waiting: OrderedDict[object, deque[asyncio.Future[None]]] = OrderedDict()  # the next to have a turn first

    @property
    def owners_waiting(self) -> int:
        """How many wait for a turn, each counted once; a newcomer's first turn comes after one of each."""
        return len(self._waiting)

    def resize(self, slots: int) -> None:
        """Allow more or fewer calls from now on; those in progress stay."""
        self.slots = slots
        self._hand_out()

    async def take(self, owner: object, until: float) -> None:
        """Wait for a slot, which is to be given back.

        Args:
            owner: whose turn it is; any object that its calls have in common.
            until: `time.monotonic` seconds.

        Raises:
            TimeoutError: the time ran out first.
        """
        if self.busy < self.slots and not self._waiting:
            self.busy += 1
            return
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        self._waiting.setdefault(owner, deque()).append(turn)
        timer = loop.call_later(max(until - time.monotonic(), 0), _time_out, turn) if until < _FOR_EVER else None
        try:
            await turn
        except BaseException:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self.give_back()  # cancelled just as the turn came
            else:
                self._leave(owner, turn)
            raise
        finally:
            if timer:
                timer.cancel()

    def give_back(self) -> None:
        """End a turn."""
        self.busy -= 1
        self._hand_out()

    def _hand_out(self) -> None:
        while self.busy < self.slots and self._waiting:
            owner, turns = self._waiting.popitem(last=False)
            turn = turns.popleft()
            if turns:
                self._waiting[owner] = turns  # behind all others
            if not turn.done():
                self.busy += 1
                turn.set_result(None)

    def _leave(self, owner: object, turn: "asyncio.Future[None]") -> None:
        turns = self._waiting.get(owner)
        if turns and turn in turns:
            turns.remove(turn)
            if not turns:
                del self._waiting[owner]


_FOR_EVER = float("inf")


def _time_out(turn: "asyncio.Future[None]") -> None:
    if not turn.done():
        turn.set_exception(TimeoutError())
