"""Between SIGTERM and the end: readiness fails first, while everything is still answered.

Load balancers ask for readiness, and go on sending requests until they have heard; meanwhile uvicorn would already have
closed the port. Clients that keep a connection are told that it ends, so that the next request takes another one.
"""

import asyncio
import contextlib
import signal
import threading
from collections.abc import Callable
from types import FrameType

DRAIN_S = 15
"""Seconds that requests in progress get once the service no longer accepts any."""
CLEANUP_S = 1.5
"""Seconds that a step of the clean-up after the last request gets."""


class Shutdown:
    """Whether the process has been told to end; it does, in uvicorn's own way, after a delay."""

    def __init__(self, delay_s: float) -> None:
        """Set the seconds during which requests are still accepted."""
        self.has_begun = False
        self._delay_s = delay_s

    def listen(self) -> None:
        """Run before uvicorn's handler of SIGTERM, inside the running event loop; a second signal ends at once.

        Only the main thread can; a server in another one ends as it is told.
        """
        end = signal.getsignal(signal.SIGTERM)
        if threading.current_thread() is not threading.main_thread() or not callable(end):
            return
        loop = asyncio.get_running_loop()

        def begin(number: int, frame: FrameType | None) -> None:
            delay_s = 0.0 if self.has_begun else self._delay_s
            self.has_begun = True
            loop.call_soon_threadsafe(loop.call_later, delay_s, end, number, frame)

        signal.signal(signal.SIGTERM, begin)


async def clean_up(step: Callable[[], object]) -> None:
    """Run a blocking step of the clean-up in a thread of its own, for `CLEANUP_S` seconds at most.

    The event loop's own threads may all be busy with requests that nobody waits for any more.
    """
    loop, done = asyncio.get_running_loop(), asyncio.Event()

    def run() -> None:
        try:
            step()
        finally:
            with contextlib.suppress(RuntimeError):  # too late: the loop is closed
                loop.call_soon_threadsafe(done.set)

    threading.Thread(target=run, name="clean-up", daemon=True).start()
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(done.wait(), CLEANUP_S)
