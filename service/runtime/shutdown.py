"""Between SIGTERM and the end: readiness fails first, while everything is still answered.

Load balancers ask for readiness, and go on sending requests until they have heard; meanwhile uvicorn would already have
closed the port. Whoever keeps a connection is told that it ends, so that the next request takes another one.
"""

import asyncio
import signal
import threading
from types import FrameType


class Shutdown:
    """Whether the process has been told to end; it does, in uvicorn's own way, after a delay."""

    def __init__(self, delay_s: float) -> None:
        self.has_begun = False
        self._delay_s = delay_s

    def listen(self) -> None:
        """Stand before uvicorn's handler of SIGTERM, inside the running event loop; a second signal ends at once.

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
