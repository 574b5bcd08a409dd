"""Put another version of a model into service, and take it back, without a failed request: behind ``bertqa models``.

The steps are load, check, switch and, once all is well, unload. Triton and the service both read the model repository,
so this job writes there and asks Triton for its progress. It leaves the active version alone until the new one has
passed its check.
"""

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from bertqa.manifest import QUESTIONS_FILE, Bundle, BundleMismatch, changed_files, rebuild
from bertqa.repository import ChangeRefused, Repository
from bertqa.spans import InvalidLogits
from service.inference.pipeline import Pipeline
from service.inference.question import Question
from service.inference.registry import ModelRegistry, ServedModel
from service.observability.metrics import Metrics
from service.settings import Settings
from service.triton.channels import tls_from
from service.triton.errors import EngineError
from service.triton.replica import TlsCredentials
from service.triton.servers import UNKNOWN, Servers, ServerUnreachable, VersionState

QUIET_S = 3.0
"""A version that has answered nothing for this long is unused; services look for a new version every second."""
_LOOK_S = 0.2
_STALE_S = 10.0  # after this time, a failure that Triton reports is from our load


class RolloutFailed(Exception):
    """The new version did not come up or did not answer as it should; what answered before still does."""


class Rollout:
    """The steps of a rollout; each leaves a working service behind, even if it fails."""

    def __init__(
        self, repository: Repository, servers: Servers, *, timeout_s: float, report: Callable[[str], None]
    ) -> None:
        self._repository = repository
        self._servers = servers
        self._timeout_s = timeout_s
        self._report = report

    def load(self, model: str, version: int) -> None:
        """Load a version next to those that are loaded, and check it.

        Raises:
            RolloutFailed, ServerUnreachable, BundleMismatch, ChangeRefused: it is not loaded.
        """
        bundle = self._whole(model, version)
        loaded_before = version in self._repository.served(model).loaded
        states = self._servers.states(model, version)
        self._repository.load(model, version)
        try:
            self._until_ready(model, version, states)
            self._ask_questions(bundle)
        except BaseException:
            if not loaded_before:  # otherwise Triton tries again every second
                self._repository.unload(model, version)
            raise

    def check(self, model: str, version: int) -> None:
        """Check that the files are complete, and that each Triton gives the answers recorded at the build.

        Raises:
            RolloutFailed, ServerUnreachable, BundleMismatch: a check failed.
        """
        bundle = self._whole(model, version)
        for url, state in self._servers.states(model, version).items():
            if state.name != "READY":
                raise RolloutFailed(
                    f"{model} {version} is not loaded in Triton at {url} ({state.name.lower()}); "
                    f"run `bertqa models load {model} {version}`"
                )
        self._ask_questions(bundle)

    def switch(self, model: str, version: int, *, unchecked: bool = False) -> None:
        """Make a loaded version the active one, after a check.

        Raises:
            RolloutFailed, ServerUnreachable, BundleMismatch, ChangeRefused: a check failed; the previous version stays
                active.
        """
        if version not in self._repository.served(model).loaded:
            raise ChangeRefused(
                f"{model}: version {version} is not loaded; run `bertqa models load {model} {version}` first"
            )
        if not unchecked:
            self.check(model, version)
        self._repository.switch(model, version)
        self._report(f"{model} answers from version {version}; every service follows within about a second")

    def rollback(self, model: str, *, unchecked: bool = False) -> None:
        """Make the previous version the active one, loading it again if needed.

        Raises:
            RolloutFailed, ServerUnreachable, BundleMismatch, ChangeRefused: there is none, or it cannot answer; nothing
                has changed.
        """
        serving = self._repository.served(model)
        if serving.previous is None:
            raise ChangeRefused(f"{model}: no version answered before {serving.active}")
        if serving.previous not in serving.loaded:
            self.load(model, serving.previous)
        self.switch(model, serving.previous, unchecked=unchecked)

    def unload(self, model: str, version: int, *, force: bool = False) -> None:
        """Make every Triton drop a version, once it gets no more requests.

        Raises:
            RolloutFailed, ServerUnreachable: it still gets requests, or a server does not answer.
            ChangeRefused: it is the active one.
        """
        if version == self._repository.served(model).active:
            self._repository.unload(model, version)  # raises, and says why
        end = time.monotonic() + self._timeout_s
        while not force:
            before = self._servers.answered(model, version)
            time.sleep(QUIET_S)
            asked = self._servers.answered(model, version) - before
            if not asked:
                break
            if time.monotonic() > end:
                raise RolloutFailed(
                    f"{model} {version} still answers, {asked} calls in the last {QUIET_S:.0f} s; is every service on "
                    "the active version? --force unloads it anyway"
                )
        self._repository.unload(model, version)
        self._until(
            lambda: all(state.name == "UNAVAILABLE" for state in self._servers.states(model, version).values()),
            f"unloading {model} {version}",
        )
        self._report(f"{model} {version} is unloaded; it stays on disk")

    def rows(self) -> list[tuple[str, ...]]:
        """List all versions as a table; the first row is the heading."""
        try:
            servers = self._servers.all_states()
        except ServerUnreachable as error:
            self._report(str(error))
            servers = {}
        rows: list[tuple[str, ...]] = [("MODEL", "VERSION", "SERVED", "TRITON", "F1", "BUILT", "IDENTITY")]
        for model, serving in self._repository.serving().items():
            for version in self._repository.versions(model):
                try:
                    manifest = self._repository.manifest(model, version)
                except BundleMismatch as error:
                    self._report(str(error))
                    continue
                states = [states.get((model, version), UNKNOWN).name.lower() for states in servers.values()]
                role = {serving.active: "active", serving.previous: "previous"}.get(version, "-")
                told = ",".join(sorted(set(states))) or "?"
                rows.append(
                    (model, str(version), role, told, f"{manifest.f1:.2f}", manifest.built[:16], manifest.identity)
                )
        return rows

    def _whole(self, model: str, version: int) -> Bundle:
        self._repository.served(model)
        if version not in (there := self._repository.versions(model)):
            raise ChangeRefused(f"{model}: there is no version {version}, only {', '.join(map(str, there))}")
        bundle = self._repository.open(model, version)
        directory = self._repository.directory(model, version)
        if changed := changed_files(directory, bundle.manifest):
            fix = rebuild(bundle.manifest.target)
            raise BundleMismatch(f"{directory / changed[0]}: has changed since it was published; {fix}")
        return bundle

    def _until_ready(self, model: str, version: int, before: Mapping[str, VersionState]) -> None:
        """Wait until every server has the version; a failure reported before the load counts only if it is repeated."""
        began = time.monotonic()
        tried = set[str]()

        def ready() -> bool:
            states = self._servers.states(model, version)
            for url, state in states.items():
                if state.name == "LOADING":
                    tried.add(url)
                failed = state.name == "UNAVAILABLE" and state.reason not in ("", "unloaded")
                if failed and (url in tried or state != before[url] or time.monotonic() - began > _STALE_S):
                    reason = " ".join(state.reason.replace("\\n", " ").split())
                    raise RolloutFailed(f"Triton at {url} cannot load {model} {version}: {reason}")
            return all(state.name == "READY" for state in states.values())

        self._until(ready, f"loading {model} {version}")
        self._report(f"{model} {version} is loaded, {time.monotonic() - began:.1f} s")

    def _until(self, condition: Callable[[], bool], doing: str) -> None:
        began = said = time.monotonic()
        while not condition():
            now = time.monotonic()
            if now - began > self._timeout_s:
                raise RolloutFailed(
                    f"{doing} took more than {self._timeout_s:.0f} s; does Triton poll this repository?"
                )
            if now - said > 5:
                said = now
                self._report(f"{doing}, {now - began:.0f} s so far")
            time.sleep(_LOOK_S)

    def _ask_questions(self, bundle: Bundle) -> None:
        path = self._repository.directory(bundle.model, bundle.version) / QUESTIONS_FILE
        questions = json.loads(path.read_bytes())
        for url in self._servers.urls:
            seconds = asyncio.run(ask(self._servers, url, bundle, questions))
            self._report(
                f"{bundle.model} {bundle.version} at {url} answers {len(questions)} questions as when it was built, "
                f"{1000 * median(seconds):.1f} ms each"
                if seconds
                else f"{path}: no question to ask"
            )


async def ask(servers: Servers, url: str, bundle: Bundle, questions: Sequence[Mapping[str, Any]]) -> list[float]:
    """Ask one server the questions of the build.

    Returns:
        Seconds of engine time for each question.

    Raises:
        RolloutFailed: the server does not answer, has loaded another engine, or gives another answer.
    """
    channels = servers.channels(url)
    metrics, settings = Metrics(), Settings()
    served = ServedModel(bundle, channels, metrics, settings)
    pipeline = Pipeline(ModelRegistry(bundle.model, {bundle.model: served}), settings, metrics)
    seconds = []
    try:
        for each in questions:
            question = Question(model=served, question=each["question"], contexts=(each["context"],))
            (result,) = await pipeline.answer([question], deadline=time.monotonic() + settings.deadline_s)
            best = result.decoded.best
            if best is None or (best.text, best.start) != (each["answer"], each["start"]):
                raise RolloutFailed(
                    f"{bundle.model} {bundle.version} at {url} answers {each['question']!r:.80} with "
                    f"{best and best.text!r:.80}; when it was built it said {each['answer']!r:.80}; "
                    + rebuild(bundle.manifest.target)
                )
            seconds.append(result.infer_s)
    except (EngineError, BundleMismatch, InvalidLogits) as error:
        raise RolloutFailed(f"{bundle.model} {bundle.version} at {url}: {error}") from error
    finally:
        pipeline.close()
        await channels.close()
    return seconds


def tls_of(settings: Settings) -> TlsCredentials | None:
    """Read the TLS files that the service would connect to Triton with.

    Raises:
        RolloutFailed: a file cannot be read.
    """
    try:
        return tls_from(settings)
    except ValueError as error:
        raise RolloutFailed(str(error)) from None
