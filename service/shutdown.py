"""Shut down in two steps: after SIGTERM readiness fails, while requests are still answered.

Load balancers keep sending requests until a readiness probe fails; by then, uvicorn alone would have closed the port.
Clients with open connections are told that these will close, so that their next request opens another one.
"""

import asyncio
import contextlib
import signal
import threading
from collections.abc import Callable
from types import FrameType

DRAIN_S = 15
"""Seconds for requests in progress to finish after the port is closed."""
CLEANUP_S = 1.5
"""Timeout in seconds of each clean-up step after the last request."""


class Shutdown:
    """Tracks whether shutdown has begun; after a delay, uvicorn's own shutdown follows."""

    def __init__(self, delay_s: float) -> None:
        """Set the seconds for which requests are still accepted."""
        self.has_begun = False
        self._delay_s = delay_s

    def listen(self) -> None:
        """Handle SIGTERM before uvicorn does, inside the running event loop; a second signal skips the delay.

        Only the main thread can handle signals; a server in another thread shuts down without the delay.
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
    """Run a blocking clean-up step in its own thread, for at most `CLEANUP_S` seconds.

    The shared threads may all be busy with abandoned requests.
    """
    loop, done = asyncio.get_running_loop(), asyncio.Event()

    def run() -> None:
        try:
            step()
        finally:
            with contextlib.suppress(RuntimeError):  # the loop is already closed
                loop.call_soon_threadsafe(done.set)

    threading.Thread(target=run, name="clean-up", daemon=True).start()
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(done.wait(), CLEANUP_S)
