"""The parts of one application, shared by all its requests."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from starlette.requests import Request

from service.api_keys import Keyring
from service.inference.pipeline import Answering, Pipeline
from service.observability.metrics import Metrics
from service.observability.readiness import ReadinessLog
from service.settings import Settings
from service.shutdown import Shutdown


@dataclass(slots=True, kw_only=True)
class Services:
    """Created by `service.app.create_app`; available as ``app.state.services`` and in the lifespan state."""

    settings: Settings
    metrics: Metrics
    shutdown: Shutdown
    keyring: Keyring | None = None  # None: no key is required
    readiness_log: ReadinessLog = field(default_factory=ReadinessLog)
    metrics_thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "metrics"))
    """Writes the metrics; its own thread, so that long texts cannot delay a scrape."""
    pipeline: Pipeline = field(init=False)
    """Set when the application has started."""
    answering: Answering = field(init=False)
    """The pipeline, or the cache around it; set when the application has started."""


def services_of(request: Request) -> Services:
    """Return the services of the application that handles a request."""
    services: Services = request.scope["app"].state.services
    return services
