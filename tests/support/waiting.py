"""Wait for other threads and processes, with a time limit."""

import time
from collections.abc import Callable


def until(
    condition: Callable[[], object], why: str = "the condition did not become true", seconds: float = 60.0
) -> float:
    """Poll a condition every 20 ms until it is true; return the seconds that it took.

    Raises:
        TimeoutError: the condition did not become true; the message has ``why``.
    """
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            raise TimeoutError(f"{why} ({seconds:.0f} s)")
        time.sleep(0.02)
    return time.monotonic() - began
