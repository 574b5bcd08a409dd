"""The models that a process serves, each at one version.

A question is bound to a `ServedModel`, which holds the tokenizer and the engine of one version. When another version
becomes active, questions in progress finish on the version that they started with.
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
    """One version of a model: its bundle, its engine in Triton, and whether the two match."""

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
        """Check the loaded engine against the manifest, once; again after the engine was unavailable.

        Raises:
            BundleMismatch: they differ.
            EngineError: the engine does not answer yet.
        """
        if not self.verified:
            await self.compare(deadline=deadline)

    async def compare(self, *, deadline: float) -> None:
        """Check the loaded engine against the manifest now; errors as in `verify`."""
        loaded = await self.admin.loaded(deadline=deadline)
        identity = loaded.parameters.get(f"identity_{self.bundle.version}", "an engine without identity")
        expected = self.bundle.manifest.identity
        if identity != expected:
            self.verified = False
            raise BundleMismatch(
                f"Triton has loaded {identity}, but version {self.bundle.version} in the service's model repository is "
                f"{expected}; use the same model repository for both, or reload Triton"
            )
        self.admission.resize(loaded.concurrency)
        self.verified = True


class ModelRegistry:
    """The served models by name."""

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
        """Model names that a question may use."""
        return list(self._models)

    def __getitem__(self, name: str | None) -> ServedModel:
        """Return the model with a name; None means the default.

        Raises:
            InvalidArgument: there is no such model; the message lists the names.
        """
        try:
            return self._models[self.default if name is None else name]
        except KeyError:
            raise InvalidArgument(("model",), f"must be one of {', '.join(self.names)}; got {name!r:.100}") from None

    def put(self, model: ServedModel) -> None:
        """Serve a version instead of the previous one."""
        self._models[model.bundle.model] = model

    def remove(self, name: str) -> None:
        """Stop serving a model."""
        del self._models[name]


def default_model(repository: Repository, wanted: str | None) -> str:
    """Return the name of the model for requests that name none.

    Args:
        repository: with the models.
        wanted: setting ``BERTQA_MODEL``; default: ``bert_qa`` or the only model.

    Raises:
        BundleMismatch: the repository has no such model, no model at all, or several and the choice is unclear.
    """
    names = list(repository.serving())
    if not names:
        repository.open()  # raises an error that says what to do
    if wanted is None:
        if MODEL_NAME not in names and len(names) > 1:
            raise BundleMismatch(f"BERTQA_MODEL: set it to the default model, one of {', '.join(names)}")
        return MODEL_NAME if MODEL_NAME in names else names[0]
    if wanted not in names:
        raise BundleMismatch(f"BERTQA_MODEL: must be one of {', '.join(names)}; got {wanted!r}")
    return wanted
