"""Roll out a version of a model, or roll it back, without failed requests: the work of ``bertqa models``.

The steps are load, check, switch and finally unload. Triton and the service both read the model repository, so this
code writes there and queries Triton for progress. The active version stays active until the new one passes its check.
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
"""Seconds without requests after which a version counts as unused; services check for a new version every second."""
_LOOK_S = 0.2
_STALE_S = 10.0  # after this time, a failure that Triton reports belongs to our load


class RolloutFailed(Exception):
    """The new version failed to load or to pass its check; the previous version keeps answering."""


class Rollout:
    """The steps of a rollout; the service keeps working even if a step fails."""

    def __init__(
        self, repository: Repository, servers: Servers, *, timeout_s: float, report: Callable[[str], None]
    ) -> None:
        self._repository = repository
        self._servers = servers
        self._timeout_s = timeout_s
        self._report = report

    def load(self, model: str, version: int) -> None:
        """Load a version in addition to the loaded ones, and check it.

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
            if not loaded_before:  # otherwise Triton retries every second
                self._repository.unload(model, version)
            raise

    def check(self, model: str, version: int) -> None:
        """Check the files, and that each Triton gives the answers recorded at build time.

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
        self._report(f"{model} now answers from version {version}; all services follow within about a second")

    def rollback(self, model: str, *, unchecked: bool = False) -> None:
        """Make the previous version the active one, loading it again if needed.

        Raises:
            RolloutFailed, ServerUnreachable, BundleMismatch, ChangeRefused: there is no previous version, or it cannot
                answer; nothing has changed.
        """
        serving = self._repository.served(model)
        if serving.previous is None:
            raise ChangeRefused(f"{model}: no version was active before {serving.active}")
        if serving.previous not in serving.loaded:
            self.load(model, serving.previous)
        self.switch(model, serving.previous, unchecked=unchecked)

    def unload(self, model: str, version: int, *, force: bool = False) -> None:
        """Unload a version from every Triton, once it gets no more requests.

        Raises:
            RolloutFailed, ServerUnreachable: it still gets requests, or a server does not answer.
            ChangeRefused: it is the active one.
        """
        if version == self._repository.served(model).active:
            self._repository.unload(model, version)  # raises an error that says why
        end = time.monotonic() + self._timeout_s
        while not force:
            before = self._servers.answered(model, version)
            time.sleep(QUIET_S)
            asked = self._servers.answered(model, version) - before
            if not asked:
                break
            if time.monotonic() > end:
                raise RolloutFailed(
                    f"{model} {version} is still in use, with {asked} calls in the last {QUIET_S:.0f} s; check that "
                    "every service uses the active version, or unload it anyway with --force"
                )
        self._repository.unload(model, version)
        self._until(
            lambda: all(state.name == "UNAVAILABLE" for state in self._servers.states(model, version).values()),
            f"unloading {model} {version}",
        )
        self._report(f"{model} {version} is unloaded; its files stay on disk")

    def rows(self) -> list[tuple[str, ...]]:
        """Return a table of all versions; the first row is the heading."""
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
                state = ",".join(sorted(set(states))) or "?"
                rows.append(
                    (model, str(version), role, state, f"{manifest.f1:.2f}", manifest.built[:16], manifest.identity)
                )
        return rows

    def _whole(self, model: str, version: int) -> Bundle:
        self._repository.served(model)
        if version not in (there := self._repository.versions(model)):
            raise ChangeRefused(f"{model}: no version {version}; the versions are {', '.join(map(str, there))}")
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
        self._report(f"{model} {version} is loaded after {time.monotonic() - began:.1f} s")

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
                f"{bundle.model} {bundle.version} at {url} answers {len(questions)} questions as at build time, "
                f"{1000 * median(seconds):.1f} ms each"
                if seconds
                else f"{path}: no question to ask"
            )


async def ask(servers: Servers, url: str, bundle: Bundle, questions: Sequence[Mapping[str, Any]]) -> list[float]:
    """Ask one server the questions recorded at build time.

    Returns:
        Seconds of engine time for each question.

    Raises:
        RolloutFailed: the server does not answer, has loaded another engine, or answers differently.
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
                    f"{best and best.text!r:.80}; at build time the answer was {each['answer']!r:.80}; "
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
    """Read the TLS files of the service's settings, for connections to Triton.

    Raises:
        RolloutFailed: a file cannot be read.
    """
    try:
        return tls_from(settings)
    except ValueError as error:
        raise RolloutFailed(str(error)) from None
