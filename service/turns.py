"""Who asks the engine next: a few calls at one time, and turns that go round the requests.

What Triton has been sent can no longer be overtaken, so it is sent only what keeps it busy. The rest waits here, each
request with its windows, and a place that becomes free goes to the request that has waited longest since its last turn:
a text of hundreds of windows and a question of one window advance alike. How long a newcomer will wait follows from how
long calls take, and who would wait too long need not begin.
"""

import asyncio
import time
from collections import OrderedDict, deque

_WEIGHT = 1 / 16  # of the latest call in the mean: that of the last thirty or so


class Turns:
    """A bound on the calls in progress, with a deadline for each that waits.

    `asyncio.Semaphore` knows no requests and no deadline, and around it `asyncio.wait_for` can lose a turn when time
    runs out just as it comes (before Python 3.12).
    """

    def __init__(self, places: int) -> None:
        self.places = places
        """Calls that may be in progress at one time."""
        self.call_s = 0.0
        """Mean seconds of a call, the latest ones counting most; 0.0 before the first."""
        self._free = places
        self._waiting: OrderedDict[object, deque[asyncio.Future[None]]] = (
            OrderedDict()
        )  # whose turn is next comes first

    def resize(self, places: int) -> None:
        """Allow more or fewer calls from now on; those in progress stay."""
        self._free += places - self.places
        self.places = places
        self._hand_out()

    async def take(self, request: object, deadline: float) -> None:
        """Wait for a turn, which is to be given back.

        Args:
            request: whose call it is; any object that its calls have in common.
            deadline: `time.monotonic` seconds.

        Raises:
            TimeoutError: the deadline passed first.
        """
        if self._free > 0 and not self._waiting:
            self._free -= 1
            return
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        self._waiting.setdefault(request, deque()).append(turn)
        timer = loop.call_later(max(deadline - time.monotonic(), 0), _time_out, turn)
        try:
            await turn
        except BaseException:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self.give_back()  # cancelled just as the turn came
            else:
                self._leave(request, turn)
            raise
        finally:
            timer.cancel()

    def give_back(self, call_s: float | None = None) -> None:
        """End a turn, and tell how long its call took if it succeeded."""
        if call_s is not None:
            self.call_s += (call_s - self.call_s) * (_WEIGHT if self.call_s else 1)
        self._free += 1
        self._hand_out()

    def expected_wait(self, ahead: int) -> float:
        """Seconds until a newcomer's first turn: with all places taken, one becomes free every ``call_s / places``.

        Args:
            ahead: requests in progress, each of which gets a turn before.
        """
        return max(ahead + 1 - self.places, 0) * self.call_s / self.places

    def _hand_out(self) -> None:
        while self._free > 0 and self._waiting:
            request, turns = self._waiting.popitem(last=False)
            turn = turns.popleft()
            if turns:
                self._waiting[request] = turns  # behind all others
            if not turn.done():
                self._free -= 1
                turn.set_result(None)

    def _leave(self, request: object, turn: "asyncio.Future[None]") -> None:
        turns = self._waiting.get(request)
        if turns and turn in turns:
            turns.remove(turn)
            if not turns:
                del self._waiting[request]


def _time_out(turn: "asyncio.Future[None]") -> None:
    if not turn.done():
        turn.set_exception(TimeoutError())
