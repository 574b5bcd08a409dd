"""Whether a model answers: one probe for all who ask at the same time, and its outcome for a second."""

import asyncio
import math
import time
from collections.abc import Callable, Coroutine
from typing import Any

REUSE_S = 1.0
"""Seconds that the outcome of a probe holds, whether it was good or bad."""


class Readiness:
    """The latest probe of one version of a model; for one event loop."""

    def __init__(self) -> None:
        self._probe: asyncio.Task[None] | None = None
        self._ended = -math.inf

    async def ask(self, probe: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Return if the model is ready; begins a probe unless one is under way, or has ended a moment ago.

        Raises:
            Exception: what the probe raised.
        """
        if self._probe is None or (self._probe.done() and time.monotonic() >= self._ended + REUSE_S):
            self._probe = asyncio.create_task(probe())
            self._probe.add_done_callback(self._note)
        asked = self._probe
        await asyncio.wait((asked,))  # which leaves it alone if we are cancelled
        if error := asked.exception():
            raise error.with_traceback(None)

    def _note(self, probe: "asyncio.Task[None]") -> None:
        self._ended = time.monotonic()
        if not probe.cancelled():
            probe.exception()  # asyncio would report one that nobody has looked at
