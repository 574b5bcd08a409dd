"""Waiting for what other threads and processes do, never for ever."""

import time
from collections.abc import Callable


def until(condition: Callable[[], object], why: str = "waited in vain", seconds: float = 60.0) -> float:
    """Wait for a condition, which is looked at every 20 ms; gives the seconds that it took.

    Raises:
        TimeoutError: it did not come true; says why that is bad.
    """
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            raise TimeoutError(f"{why} ({seconds:.0f} s)")
        time.sleep(0.02)
    return time.monotonic() - began
