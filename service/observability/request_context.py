"""What is known of the request being handled, in one place: for its headers, its log line, its span and its metrics.

Middleware makes one `RequestContext` for each request; whoever handles a part of the request adds to it. All tasks and
threads of a request share it.
"""

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any


def _charge_nobody(unit: Any, number: int) -> None:
    """Take a request that came without an API key."""


@dataclass(slots=True)
class RequestContext:
    """One HTTP request; seconds are those of the slowest question where it asks several, as in ``server-timing``."""

    request_id: str = ""
    trace_id: str = ""
    keeps_texts: bool = False
    api_key: str | None = None
    """Name of the key that came with the request; None where no key is needed."""
    charge: Callable[[Any, int], None] = _charge_nobody
    """Charges the key for a number of units, beyond those that were charged when the request came."""
    error_type: str | None = None
    """Why the request was not answered."""
    received_bytes: int = 0
    """Of the body, as far as it was read."""
    models: set[str] = field(default_factory=set)
    """Identities of the engines that were asked."""
    windows: int = 0
    tokenize_s: float = 0.0
    infer_s: float = 0.0
    decode_s: float = 0.0
    questions: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    """Each with its contexts, if the request's texts may be kept."""

    def tokenized(self, model: str, seconds: float, windows: int) -> None:
        """Add a question that became windows for a model, named by its identity."""
        self.models.add(model)
        self.charge("window", windows - (not self.windows))  # one was charged when the request came
        self.tokenize_s = max(self.tokenize_s, seconds)
        self.windows += windows

    def answered(self, infer_s: float, decode_s: float) -> None:
        """Add a question that was answered."""
        self.infer_s, self.decode_s = max(self.infer_s, infer_s), max(self.decode_s, decode_s)

    def asked(self, question: str, contexts: tuple[str, ...]) -> None:
        """Add what was asked, if that may be kept."""
        if self.keeps_texts:
            self.questions.append((question, contexts))

    def fields(self) -> dict[str, object]:
        """Return what is known by the names that logs and traces use, without what is unknown or empty."""
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
    """Name the route that took a request, for metrics and logs: never the address, which may hold anything."""
    path: str | None = getattr(scope.get("route"), "path", None)
    return path or ("/static" if scope["path"].startswith("/static/") else "unmatched")


request_context: ContextVar[RequestContext] = ContextVar("request_context", default=RequestContext())  # noqa: B039
"""The request being handled; outside of any, as in a probe of a new version, a context that nobody reads."""
