"""The models that a process answers with, each at the version that ``serving.json`` names, followed while it runs.

A question is put to a `Served`, which holds tokenizer and engine of one version together; when another version takes
over, questions in progress end with the one that they began with.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Any

from bertqa.manifest import MODEL_NAME, Bundle, BundleMismatch
from bertqa.repository import SERVING_FILE, Repository
from service.api.errors import InvalidField
from service.inference.admission import Admission
from service.inference.cache import Cache
from service.inference.readiness import Readiness
from service.inference.worker_pool import Watchman
from service.observability.metrics import Metrics
from service.settings import Settings
from service.triton.channels import EngineFactory

FOLLOW_S = 1.0
"""Seconds between two looks at the repository."""
PROBE_S = 5.0
"""Seconds that a question to a new version may take before it is tried again."""

log = logging.getLogger("bertqa.service")


class Served:
    """One version of a model: its bundle, the engine that Triton has loaded from it, and whether those agree."""

    def __init__(self, bundle: Bundle, engines: EngineFactory, metrics: Metrics, settings: Settings) -> None:
        self.bundle = bundle
        self.engine = engines.engine(bundle.model, bundle.version)
        self.admin = engines.admin(bundle.model, bundle.version)
        self.admission = Admission(settings.max_wait_s, settings.max_in_flight)
        self.readiness = Readiness()
        self.count = metrics.questions(bundle.model, bundle.version)
        self.verified = False
        self.cache: Cache[Any] | None = None  # of results, for whoever answers

    async def verify(self, *, deadline: float) -> None:
        """Compare the loaded engine with the manifest; costs nothing from then on, until the engine has been away.

        Raises:
            BundleMismatch: they differ.
            ModelError: the engine cannot be asked yet.
        """
        if not self.verified:
            await self.compare(deadline=deadline)

    async def compare(self, *, deadline: float) -> None:
        """Compare them now, whatever is known; errors as in `verify`."""
        loaded = await self.admin.loaded(deadline=deadline)
        identity = loaded.parameters.get(f"identity_{self.bundle.version}", "an engine without identity")
        expected = self.bundle.manifest.identity
        if identity != expected:
            self.verified = False
            raise BundleMismatch(
                f"Triton has loaded {identity}, but version {self.bundle.version} of the repository that the service "
                f"reads is {expected}; give both the same model repository, or reload Triton"
            )
        self.admission.resize(loaded.concurrency)
        self.verified = True


class Models:
    """What is served now, by name."""

    def __init__(self, default: str, served: dict[str, Served]) -> None:
        self.default = default
        self._served = served

    def __iter__(self) -> Iterator[Served]:
        return iter(self._served.values())

    def __len__(self) -> int:
        return len(self._served)

    def __contains__(self, name: str) -> bool:
        return name in self._served

    @property
    def names(self) -> list[str]:
        """What a question may name."""
        return list(self._served)

    def __getitem__(self, name: str | None) -> Served:
        """The model of that name; without one, the default.

        Raises:
            InvalidField: there is none; the message names those that there are.
        """
        try:
            return self._served[self.default if name is None else name]
        except KeyError:
            raise InvalidField("model", f"must be one of {', '.join(self.names)}; got {name!r:.100}") from None

    def put(self, served: Served) -> None:
        """Let a version answer in place of the one that did."""
        self._served[served.bundle.model] = served

    def remove(self, name: str) -> None:
        """Answer no longer for a model."""
        del self._served[name]


def default_model(repository: Repository, wanted: str | None) -> str:
    """Name the model that answers requests which name none.

    Args:
        repository: with the models.
        wanted: setting ``BERTQA_MODEL``; without it, ``bert_qa`` or the only model.

    Raises:
        BundleMismatch: the repository has no such model or none at all, or must be told which of several it is.
    """
    names = list(repository.serving())
    if not names:
        repository.open()  # raises, and says what to do
    if wanted is None:
        if MODEL_NAME not in names and len(names) > 1:
            raise BundleMismatch(f"BERTQA_MODEL: must say which is the default of {', '.join(names)}")
        return MODEL_NAME if MODEL_NAME in names else names[0]
    if wanted not in names:
        raise BundleMismatch(f"BERTQA_MODEL: must be one of {', '.join(names)}; got {wanted!r}")
    return wanted


class Follower:
    """Keeps `Models` at what the repository says."""

    def __init__(self, repository: Repository, engines: EngineFactory, metrics: Metrics, settings: Settings) -> None:
        """Name the parts.

        Args:
            repository: read only.
            engines: makes the clients of each version.
            metrics: of the application.
            settings: likewise.
        """
        self._repository = repository
        self._engines = engines
        self._metrics = metrics
        self._settings = settings
        self._watchman = Watchman("repository")
        self._seen: tuple[int, ...] = ()  # the stamp, when the repository was last read
        self._said: dict[str, str] = {}  # what is in the way of a model's version

    def start(self, default: str | None) -> Models:
        """Open the active version of every model, whether the engine is up or not.

        Raises:
            BundleMismatch: there is none, one is not whole, or the default is none of them.
        """
        self._seen = self._stamp()
        default = default_model(self._repository, default)
        names = self._repository.serving()
        return Models(default, {name: self._served(self._repository.open(name)) for name in names})

    async def follow(self, models: Models, probe: Callable[[Served, float], Awaitable[object]]) -> None:
        """Go over to another version whenever the repository says so, for ever.

        The new version answers a question first; until it can, the one before goes on.

        Args:
            models: to keep.
            probe: sends a real question to a model, by a deadline in `time.monotonic` seconds.
        """
        try:
            while True:
                await asyncio.sleep(FOLLOW_S)
                try:
                    await self._look(models, probe)
                except Exception:  # whatever it is, the next look may go well
                    log.exception("the repository could not be looked at; it will be again")
        finally:
            self._watchman.close()

    async def _look(self, models: Models, probe: Callable[[Served, float], Awaitable[object]]) -> None:
        stamp = await self._watchman.run(self._stamp)
        if stamp == self._seen and not self._said:
            return
        try:
            serving = await self._watchman.run(self._repository.serving)
        except (BundleMismatch, OSError) as error:
            self._say("", str(error))
            return
        self._seen = stamp
        self._said = {name: said for name, said in self._said.items() if name in serving}
        for name, wanted in serving.items():
            if name in models and models[name].bundle.version == wanted.active:
                self._said.pop(name, None)
                continue
            try:
                new = self._served(await self._watchman.run(self._repository.open, name, wanted.active))
                await probe(new, time.monotonic() + PROBE_S)
            except Exception as error:  # whatever it is, the version before goes on
                self._say(name, f"version {wanted.active} of {name} cannot answer yet: {error}")
                continue
            self._said.pop(name, None)
            models.put(new)
            log.warning("%s answers from version %d now, %s", name, wanted.active, new.bundle.manifest.identity)
            self._metrics.serves(each.bundle for each in models)
        for name in [each.bundle.model for each in models if each.bundle.model not in serving]:
            if name != models.default:
                models.remove(name)
                self._metrics.serves(each.bundle for each in models)

    def _served(self, bundle: Bundle) -> Served:
        return Served(bundle, self._engines, self._metrics, self._settings)

    def _say(self, name: str, problem: str) -> None:
        """Log a problem once, not every second."""
        if self._said.get(name) != problem:
            log.warning("%s", problem)
        self._said[name] = problem

    def _stamp(self) -> tuple[int, ...]:
        """Changes with ``serving.json``, and when a model's directory comes or goes."""
        stamp = []
        for path in (self._repository.root, self._repository.root / SERVING_FILE):
            with suppress(OSError):
                stamp += [path.stat().st_mtime_ns, path.stat().st_ino]
        return tuple(stamp)
