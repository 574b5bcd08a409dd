"""Watch ``serving.json`` while the process runs, and serve a version once it becomes active."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from bertqa.manifest import Bundle, BundleMismatch
from bertqa.repository import SERVING_FILE, Repository
from service.inference.registry import ModelRegistry, ServedModel, default_model
from service.observability.metrics import Metrics
from service.settings import Settings
from service.triton.channels import EngineFactory

T = TypeVar("T")

LOOK_S = 1.0
"""Seconds between two checks of the repository."""
PROBE_S = 5.0
"""Timeout in seconds of the question to a new version, before the next try."""

log = logging.getLogger("bertqa.service")


class RepositoryWatcher:
    """Keeps a `ModelRegistry` in step with the repository."""

    def __init__(self, repository: Repository, engines: EngineFactory, metrics: Metrics, settings: Settings) -> None:
        """Set the repository to watch.

        Args:
            repository: only read.
            engines: makes the clients of each version.
            metrics: metrics of the application.
            settings: settings of the application.
        """
        self._repository = repository
        self._engines = engines
        self._metrics = metrics
        self._settings = settings
        self._thread = ThreadPoolExecutor(1, "repository")
        self._seen: tuple[int, ...] = ()  # the stamp when the repository was last read
        self._said: dict[str, str] = {}  # the logged problem of each model

    def start(self, default: str | None) -> ModelRegistry:
        """Open the active version of every model; the engine need not be up.

        Raises:
            BundleMismatch: there is no model, a version is incomplete, or there is no such default model.
        """
        self._seen = self._stamp()
        default = default_model(self._repository, default)
        names = self._repository.serving()
        return ModelRegistry(default, {name: self._served(self._repository.open(name)) for name in names})

    async def follow(self, registry: ModelRegistry, probe: Callable[[ServedModel, float], Awaitable[object]]) -> None:
        """Switch to the active version whenever it changes, until cancelled.

        The new version must answer a question first; until then, the previous version keeps answering.

        Args:
            registry: registry to update.
            probe: sends a real question to a model, by a deadline in `time.monotonic` seconds.
        """
        try:
            while True:
                await asyncio.sleep(LOOK_S)
                try:
                    await self._look(registry, probe)
                except Exception:  # the next check may succeed
                    log.exception("cannot check the repository; trying again")
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)

    async def _look(self, registry: ModelRegistry, probe: Callable[[ServedModel, float], Awaitable[object]]) -> None:
        stamp = await self._in_thread(self._stamp)
        if stamp == self._seen and not self._said:
            return
        try:
            serving = await self._in_thread(self._repository.serving)
        except (BundleMismatch, OSError) as error:
            self._say("", str(error))
            return
        self._seen = stamp
        self._said = {name: said for name, said in self._said.items() if name in serving}
        for name, wanted in serving.items():
            if name in registry and registry[name].bundle.version == wanted.active:
                self._said.pop(name, None)
                continue
            try:
                new = self._served(await self._in_thread(self._repository.open, name, wanted.active))
                await probe(new, time.monotonic() + PROBE_S)
            except Exception as error:  # the previous version keeps answering
                self._say(name, f"version {wanted.active} of {name} cannot answer yet: {error}")
                continue
            self._said.pop(name, None)
            registry.put(new)
            log.warning("%s now answers from version %d, %s", name, wanted.active, new.bundle.manifest.identity)
            self._metrics.serves(each.bundle for each in registry)
        for name in [each.bundle.model for each in registry if each.bundle.model not in serving]:
            if name != registry.default:
                registry.remove(name)
                self._metrics.serves(each.bundle for each in registry)

    def _served(self, bundle: Bundle) -> ServedModel:
        return ServedModel(bundle, self._engines, self._metrics, self._settings)

    async def _in_thread(self, work: Callable[..., T], *arguments: object) -> T:
        # A thread of its own, because questions may occupy all shared threads.
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    def _say(self, name: str, problem: str) -> None:
        """Log a problem once, not every second."""
        if self._said.get(name) != problem:
            log.warning("%s", problem)
        self._said[name] = problem

    def _stamp(self) -> tuple[int, ...]:
        """Return a value that changes with ``serving.json`` and with the list of model directories."""
        stamp = []
        for path in (self._repository.root, self._repository.root / SERVING_FILE):
            with suppress(OSError):
                stamp += [path.stat().st_mtime_ns, path.stat().st_ino]
        return tuple(stamp)
