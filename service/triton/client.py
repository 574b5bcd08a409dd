"""The engine: windows in, start and end logits out."""

import asyncio
import time
from collections.abc import Sequence
from functools import partial
from typing import Protocol

from bertqa.spans import Logits
from bertqa.windows import Window
from service.observability.request_context import request_context
from service.triton.failover import Failover
from service.triton.wire import RequestEncoder, decode_logits


class Engine(Protocol):
    """Computes the logits of windows; `TritonEngine` implements it."""

    async def predict(self, windows: Sequence[Window], *, deadline: float) -> list[Logits]:
        """Run the engine on all windows concurrently; if one fails, the call fails.

        Args:
            windows: no more than may be in progress at one time.
            deadline: in `time.monotonic` seconds.

        Returns:
            Start and end logits of each window, each float32 of shape (1, length); may be read-only.

        Raises:
            EngineError: a window failed; the calls for the others are cancelled.
        """
        ...


class TritonEngine:
    """The `Engine` of a model version in Triton; made by `service.triton.channels.Channels`."""

    def __init__(self, failover: Failover) -> None:
        self._failover = failover
        self._encoder = RequestEncoder(failover.model, failover.version)

    async def predict(self, windows: Sequence[Window], *, deadline: float) -> list[Logits]:
        """Run the engine, as described in `Engine`."""
        if len(windows) == 1:  # the common case needs no task
            return [await self._predict(windows[0], deadline)]
        calls = [asyncio.ensure_future(self._predict(window, deadline)) for window in windows]
        try:
            return await asyncio.gather(*calls)
        except BaseException:  # one failed, or the caller was cancelled: leave nothing running
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            raise

    async def _predict(self, window: Window, deadline: float) -> Logits:
        request = self._encoder.encode(
            window, request_id=request_context.get().request_id, timeout_s=deadline - time.monotonic()
        )
        read = partial(decode_logits, length=window.length)
        return await self._failover.call("ModelInfer", request, deadline, read, proves_engine=True)
