"""Limit the engine calls in progress, and share the slots fairly between owners.

Requests already in Triton cannot be reordered, so we keep Triton's queue short and queue fairly here. A free slot goes
to the owner that has waited longest since its last turn. So an owner with hundreds of calls and one with a single call
advance at the same rate.
"""

import asyncio
import time
from collections import OrderedDict, deque


class FairQueue:
    """Gives slots to owners round robin, with a deadline for each waiting call.

    `asyncio.Semaphore` has neither owners nor deadlines. Before Python 3.12, `asyncio.wait_for` around it can lose a
    slot that is granted just as the time runs out.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        """Limit on the calls in progress."""
        self.busy = 0
        """Calls in progress."""
        self._waiting: OrderedDict[object, deque[asyncio.Future[None]]] = (
            OrderedDict()
        )  # the next turn is that of the first

    @property
    def owners_waiting(self) -> int:
        """Number of owners that wait; a new owner gets its first turn after one turn of each."""
        return len(self._waiting)

    def resize(self, slots: int) -> None:
        """Change the limit; calls in progress continue."""
        self.slots = slots
        self._hand_out()

    async def take(self, owner: object, until: float) -> None:
        """Wait for a slot; release it with `give_back`.

        Args:
            owner: object that all calls of the owner share.
            until: deadline in `time.monotonic` seconds.

        Raises:
            TimeoutError: the deadline passed.
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
                self.give_back()  # cancelled just when it got the slot
            else:
                self._leave(owner, turn)
            raise
        finally:
            if timer:
                timer.cancel()

    def give_back(self) -> None:
        """Release a slot."""
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
