"""Child processes: restart pauses, ending with the parent, and ending a session."""

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator

import psutil

_MAX_PAUSE_S = 30.0  # between restarts
_STEADY_S = 60.0  # after running this long, a death counts as the first again
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


def restart_pauses() -> Iterator[float]:
    """Yield the seconds to wait before each start: first 0, then increasing; reset after a long run."""
    pause = 0.0
    while True:
        began = time.monotonic()
        yield pause
        lived = time.monotonic() - began - pause
        pause = 0.5 if not pause or lived > _STEADY_S else min(2 * pause, _MAX_PAUSE_S)


def die_with_parent(number: signal.Signals) -> Callable[[], None]:
    """Return a ``preexec_fn`` that makes the kernel signal the child when the thread that started it ends."""
    parent = os.getpid()

    def prepare() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, int(number))
        if os.getppid() != parent:  # it ended in the meantime
            os._exit(1)

    return prepare


def living_children(pid: int) -> frozenset[int]:
    """Return the ids of the living children of a process."""
    try:
        children = psutil.Process(pid).children()
    except psutil.NoSuchProcess:
        return frozenset()
    return frozenset(child.pid for child in children if is_living(child.pid))


def is_living(pid: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def end_session(process: "subprocess.Popen[bytes]", timeout_s: float) -> None:
    """End a session leader with SIGTERM, or SIGKILL after the timeout, and then the rest of its session."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # children that outlived it
