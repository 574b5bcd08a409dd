"""The facts about a request, in one place, for its headers, log line, span and metrics.

Middleware creates one `RequestContext` per request, and the code that handles the request adds to it. All tasks and
threads of a request share it.
"""

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any


def _charge_nobody(unit: Any, number: int) -> None:
    """Charge nothing, for requests without an API key."""


@dataclass(slots=True)
class RequestContext:
    """One HTTP request; with several questions, seconds are those of the slowest, as in ``server-timing``."""

    request_id: str = ""
    trace_id: str = ""
    keeps_texts: bool = False
    api_key: str | None = None
    """Name of the request's API key; None if no key is required."""
    charge: Callable[[Any, int], None] = _charge_nobody
    """Charges the key for more units, beyond those charged when the request arrived."""
    error_type: str | None = None
    """Why the request failed."""
    received_bytes: int = 0
    """Bytes of the body that were read."""
    models: set[str] = field(default_factory=set)
    """Identities of the engines that were used."""
    windows: int = 0
    tokenize_s: float = 0.0
    infer_s: float = 0.0
    decode_s: float = 0.0
    questions: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    """Questions with their contexts, if the texts may be kept."""

    def tokenized(self, model: str, seconds: float, windows: int) -> None:
        """Add a tokenized question; ``model`` is the identity of the engine."""
        self.models.add(model)
        self.charge("window", windows - (not self.windows))  # one was charged when the request arrived
        self.tokenize_s = max(self.tokenize_s, seconds)
        self.windows += windows

    def answered(self, infer_s: float, decode_s: float) -> None:
        """Add an answered question."""
        self.infer_s, self.decode_s = max(self.infer_s, infer_s), max(self.decode_s, decode_s)

    def asked(self, question: str, contexts: tuple[str, ...]) -> None:
        """Add the texts of a question, if they may be kept."""
        if self.keeps_texts:
            self.questions.append((question, contexts))

    def fields(self) -> dict[str, object]:
        """Return the fields for logs and traces, without those that are unknown or empty."""
        found: dict[str, object] = {}
        if self.models:
            found["model"] = ",".join(sorted(self.models))
        if self.windows:
            found["windows"] = self.windows
        for name, seconds in (
            ("tokenize_seconds", self.tokenize_s),
            ("infer_seconds", self.infer_s),
            ("decode_seconds", self.decode_s),
        ):
            if rounded := round(seconds, 6):
                found[name] = rounded
        return found


def route_of(scope: Mapping[str, Any]) -> str:
    """Return the route of a request for metrics and logs; never the URL, which may contain anything."""
    path: str | None = getattr(scope.get("route"), "path", None)
    return path or ("/static" if scope["path"].startswith("/static/") else "unmatched")


request_context: ContextVar[RequestContext] = ContextVar("request_context", default=RequestContext())  # noqa: B039
"""The current request; outside requests, as in a probe of a new version, a context that is not read."""
