"""How long a service's event loop answers nobody, told apart from what a busy machine keeps from it."""

import contextlib
import http.client
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tests.chaos.wire import Address

TICK_S = 0.005
"""Seconds between two looks."""


class Times:
    """What Linux knows of a process's threads, or of one thread: seconds on a core, and ready but without one."""

    def __init__(self, process: int, thread: int | str = "*") -> None:
        self._files = f"task/{thread}/schedstat"
        self._process = Path(f"/proc/{process}")
        self.begin()

    def begin(self) -> None:
        """Count from now on."""
        self._before = self._read()

    def _read(self) -> dict[str, tuple[int, int]]:
        found = {}
        for file in self._process.glob(self._files):
            with contextlib.suppress(OSError, ValueError):  # the thread has ended
                ran, waited, _ = map(int, file.read_bytes().split())
                found[file.parent.name] = ran, waited
        return found

    def _since(self, which: int) -> list[float]:
        return [(now[which] - self._before.get(name, (0, 0))[which]) / 1e9 for name, now in self._read().items()]

    @property
    def ran_s(self) -> float:
        """CPU time of all threads."""
        return sum(self._since(0))

    @property
    def waited_s(self) -> float:
        """Of the thread that waited for a core for longest."""
        return max(self._since(1), default=0.0)


def memory_mib(process: int, name: str = "VmRSS") -> float:
    """Resident memory of a process, now or (``VmHWM``) at its peak."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) / 1024


class Pulse:
    """Asks for a process's liveness all the time, on a connection of its own.

    A look's hold is the time that it took, less what one of the process's threads and this one waited for a core.
    """

    def __init__(self, address: Address, process: int) -> None:
        self._address, self._process = address, process
        self._lock = threading.Lock()
        self._since, self._looks, self._longest = 0.0, 0, 0.0
        self._done = threading.Event()
        self.failures: list[str] = []

    @contextlib.contextmanager
    def beating(self) -> Iterator["Pulse"]:
        """Look as long as a block lasts."""
        thread = threading.Thread(target=self._beat, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._done.set()
            thread.join()

    def begin(self) -> None:
        """Forget what was; a look that is in progress counts from now on."""
        with self._lock:
            self._since, self._looks, self._longest = time.monotonic(), 0, 0.0

    def longest(self, seconds: float = 30.0) -> float:
        """Longest hold since then, once a look that began meanwhile has ended."""
        looks, end = self._looks, time.monotonic() + seconds
        while self._looks < looks + 2 and time.monotonic() < end:
            time.sleep(TICK_S)
        return self._longest

    def _beat(self) -> None:
        connection = http.client.HTTPConnection(*self._address, timeout=60)
        theirs, own = Times(self._process), Times(os.getpid(), threading.get_native_id())
        while not self._done.wait(TICK_S):
            theirs.begin()
            own.begin()
            began = time.monotonic()
            try:
                connection.request("GET", "/health/live")
                connection.getresponse().read()
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                self.failures.append(f"/health/live after {time.monotonic() - began:.2f} s: {error!r}")
            ended = time.monotonic()
            waited = theirs.waited_s + own.waited_s
            with self._lock:
                hold = max(ended - max(began, self._since) - waited, 0.0)
                self._looks, self._longest = self._looks + 1, max(self._longest, hold)
        connection.close()
