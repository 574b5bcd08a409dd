"""An engine for batch jobs: it retries while Triton is full, until a time limit."""

import asyncio
import time
from collections.abc import Sequence

from bertqa.backoff import pauses
from bertqa.spans import Logits
from bertqa.windows import Window
from service.commands.batch.errors import BatchStopped
from service.inference.pipeline import side_by_side
from service.triton.admin import EngineAdmin, Loaded
from service.triton.channels import EngineFactory
from service.triton.client import Engine
from service.triton.errors import EngineOverloaded

CALL_S = 120.0
"""Timeout in seconds of a window in Triton."""


class SteadyEngines:
    """Makes clients that wait and retry, from the clients of another factory."""

    def __init__(self, engines: EngineFactory, patience_s: float) -> None:
        self._engines = engines
        self._patience_s = patience_s

    def engine(self, model: str, version: int) -> "SteadyEngine":
        """Make the engine client for a version of a model."""
        return SteadyEngine(self._engines.engine(model, version), self._patience_s)

    def admin(self, model: str, version: int) -> "SteadyAdmin":
        """Make the admin client for a version of a model."""
        return SteadyAdmin(self._engines.admin(model, version))

    async def close(self) -> None:
        """Close the connections."""
        await self._engines.close()


class SteadyAdmin:
    """An `EngineAdmin` that limits each call to `CALL_S`, even with a later deadline."""

    def __init__(self, admin: EngineAdmin) -> None:
        self._admin = admin

    async def check_ready(self, *, deadline: float) -> None:
        """Return if the model can be called, as described in `EngineAdmin`."""
        await self._admin.check_ready(deadline=_soon(deadline))

    async def loaded(self, *, deadline: float) -> Loaded:
        """Look up what the server has loaded, as described in `EngineAdmin`."""
        return await self._admin.loaded(deadline=_soon(deadline))

    async def server_version(self, *, deadline: float) -> str:
        """Look up the version of the server, as described in `EngineAdmin`."""
        return await self._admin.server_version(deadline=_soon(deadline))


class SteadyEngine:
    """Wraps an engine: resends a window while Triton's queue is full."""

    def __init__(self, engine: Engine, patience_s: float) -> None:
        self._engine = engine
        self._patience_s = patience_s
        self._heard = time.monotonic()

    async def predict(self, windows: Sequence[Window], *, deadline: float) -> list[Logits]:
        """As in `Engine`, but with `CALL_S` for each window, and without `EngineOverloaded`.

        Raises:
            BatchStopped: the engine has rejected windows and computed none for longer than the time limit.
        """
        return await side_by_side([self._predict(window, deadline) for window in windows])

    async def _predict(self, window: Window, deadline: float) -> Logits:
        began = time.monotonic()
        for pause in pauses():
            try:
                (logits,) = await self._engine.predict([window], deadline=_soon(deadline))
            except EngineOverloaded as error:
                quiet_s = time.monotonic() - max(began, self._heard)
                if quiet_s > self._patience_s:
                    raise BatchStopped(f"the engine has computed nothing for {quiet_s:.0f} s: {error}") from error
            else:
                self._heard = time.monotonic()
                return logits
            await asyncio.sleep(pause)  # Triton gives no retry time
        raise AssertionError("pauses never end")


def _soon(deadline: float) -> float:
    return min(deadline, time.monotonic() + CALL_S)
