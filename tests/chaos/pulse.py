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


def waited_s(process: str | int) -> float:
    """Seconds that a process's threads were ready to run and others had the cores; 0 where Linux does not say."""
    waited = 0
    for file in Path(f"/proc/{process}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # the thread has ended
            waited += int(file.read_bytes().split()[1])
    return waited / 1e9


def cpu_s(process: int) -> float:
    """Seconds of CPU time that a process has taken."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_mib(process: int, name: str = "VmRSS") -> float:
    """Resident memory of a process, now or (``VmHWM``) at its peak."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) / 1024


class Pulse:
    """Asks for a process's liveness all the time, on a connection of its own.

    A look's hold is the time that it took, less what the process's threads and this one waited for a core meanwhile. Of
    a busy machine nothing is left but what Linux does not know of, as the time that a hypervisor takes.
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
        while not self._done.wait(TICK_S):
            own = f"{os.getpid()}/task/{threading.get_native_id()}"
            others, ours = waited_s(self._process), _waited_s(own)
            began = time.monotonic()
            try:
                connection.request("GET", "/health/live")
                connection.getresponse().read()
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                self.failures.append(f"/health/live after {time.monotonic() - began:.2f} s: {error!r}")
            ended = time.monotonic()
            waited = waited_s(self._process) - others + _waited_s(own) - ours
            with self._lock:
                hold = max(ended - max(began, self._since) - waited, 0.0)
                self._looks, self._longest = self._looks + 1, max(self._longest, hold)
        connection.close()


def _waited_s(thread: str) -> float:
    try:
        return int(Path(f"/proc/{thread}/schedstat").read_bytes().split()[1]) / 1e9
    except OSError:
        return 0.0
