"""Share readiness probes: concurrent callers share one, and its outcome is kept for a second."""

import asyncio
import math
import time
from collections.abc import Callable, Coroutine
from typing import Any

REUSE_S = 1.0
"""Seconds for which the outcome of a probe is kept, good or bad."""


class Readiness:
    """The latest probe of one version of a model; for one event loop."""

    def __init__(self) -> None:
        self._probe: asyncio.Task[None] | None = None
        self._ended = -math.inf

    async def ask(self, probe: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Check that the model is ready; starts a probe unless one is running or has just ended.

        Raises:
            Exception: the error of the probe.
        """
        if self._probe is None or (self._probe.done() and time.monotonic() >= self._ended + REUSE_S):
            self._probe = asyncio.create_task(probe())
            self._probe.add_done_callback(self._note)
        asked = self._probe
        await asyncio.wait((asked,))  # does not cancel it if we are cancelled
        if error := asked.exception():
            raise error.with_traceback(None)

    def _note(self, probe: "asyncio.Task[None]") -> None:
        self._ended = time.monotonic()
        if not probe.cancelled():
            probe.exception()  # or asyncio would report it as never retrieved
