"""The models that a process answers with, each at one version.

A question is put to a `ServedModel`, which holds tokenizer and engine of one version together; when another version
takes over, questions in progress end with the one that they began with.
"""

from collections.abc import Iterator
from typing import Any

from bertqa.errors import InvalidArgument
from bertqa.manifest import MODEL_NAME, Bundle, BundleMismatch
from bertqa.repository import Repository
from service.inference.admission import Admission
from service.inference.readiness import Readiness
from service.inference.shared_values import SharedValues
from service.observability.metrics import Metrics
from service.settings import Settings
from service.triton.channels import EngineFactory


class ServedModel:
    """One version of a model: its bundle, the engine that Triton has loaded from it, and whether those agree."""

    def __init__(self, bundle: Bundle, engines: EngineFactory, metrics: Metrics, settings: Settings) -> None:
        self.bundle = bundle
        self.engine = engines.engine(bundle.model, bundle.version)
        self.admin = engines.admin(bundle.model, bundle.version)
        self.admission = Admission(settings.max_wait_s, settings.max_in_flight)
        self.readiness = Readiness()
        self.count = metrics.questions(bundle.model, bundle.version)
        self.verified = False
        self.cache: SharedValues[Any] | None = None  # of results; made by `CachedPipeline`

    async def verify(self, *, deadline: float) -> None:
        """Compare the loaded engine with the manifest; costs nothing from then on, until the engine has been away.

        Raises:
            BundleMismatch: they differ.
            EngineError: the engine cannot be asked yet.
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


class ModelRegistry:
    """What is served now, by name."""

    def __init__(self, default: str, models: dict[str, ServedModel]) -> None:
        self.default = default
        self._models = models

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models.values())

    def __len__(self) -> int:
        return len(self._models)

    def __contains__(self, name: str) -> bool:
        return name in self._models

    @property
    def names(self) -> list[str]:
        """What a question may name."""
        return list(self._models)

    def __getitem__(self, name: str | None) -> ServedModel:
        """The model of that name; without one, the default.

        Raises:
            InvalidArgument: there is none; the message names those that there are.
        """
        try:
            return self._models[self.default if name is None else name]
        except KeyError:
            raise InvalidArgument(("model",), f"must be one of {', '.join(self.names)}; got {name!r:.100}") from None

    def put(self, model: ServedModel) -> None:
        """Let a version answer in place of the one that did."""
        self._models[model.bundle.model] = model

    def remove(self, name: str) -> None:
        """Answer no longer for a model."""
        del self._models[name]


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
