"""Child processes: how they start, that they end with us, and how they are ended."""

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator

import psutil

_MAX_PAUSE_S = 30.0  # between restarts
_STEADY_S = 60.0  # after so long a life, a death counts as the first again
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


def restart_pauses() -> Iterator[float]:
    """Seconds to wait before each start of a process: none, then more and more; after a long life it begins anew."""
    pause = 0.0
    while True:
        began = time.monotonic()
        yield pause
        lived = time.monotonic() - began - pause
        pause = 0.5 if not pause or lived > _STEADY_S else min(2 * pause, _MAX_PAUSE_S)


def die_with_parent(number: signal.Signals) -> Callable[[], None]:
    """A ``preexec_fn`` that lets the kernel send the child a signal when the thread that started it is gone."""
    parent = os.getpid()

    def prepare() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, int(number))
        if os.getppid() != parent:  # it went in between
            os._exit(1)

    return prepare


def living_children(pid: int) -> frozenset[int]:
    """Process ids of the children of a process that have not ended."""
    try:
        children = psutil.Process(pid).children()
    except psutil.NoSuchProcess:
        return frozenset()
    return frozenset(child.pid for child in children if is_living(child.pid))


def is_living(pid: int) -> bool:
    """Whether a process exists and has not ended: a zombie has."""
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def end_session(process: "subprocess.Popen[bytes]", timeout_s: float) -> None:
    """End a process that leads its own session: SIGTERM, SIGKILL when it takes too long, and then what it left."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # children that outlived it
