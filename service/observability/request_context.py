"""What becomes known of a request on its way, gathered for its line in the log and its span in a trace.

Whoever handles a part of it adds to `current_record`; a request's tasks and threads share one record.
"""

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class RequestRecord:
    """One HTTP request; seconds are those of the slowest question where it asks several, as in ``server-timing``."""

    request_id: str = ""
    trace_id: str = ""
    keeps_texts: bool = False
    models: set[str] = field(default_factory=set)  # identities
    windows: int = 0
    tokenize_s: float = 0.0
    infer_s: float = 0.0
    decode_s: float = 0.0
    charge: Callable[[Any, int], None] = lambda unit, number: None  # the API key, with what a request takes
    questions: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)  # with contexts; if it keeps texts

    def tokenized(self, model: str, seconds: float, windows: int) -> None:
        """Add a question that became windows for a model, named by its identity."""
        self.models.add(model)
        self.charge("window", windows - (not self.windows))  # one was taken when the request came
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
        """What is known, by the names that logs and traces give it; what is not known or empty is left out."""
        found: dict[str, object] = {
            "model": ",".join(sorted(self.models)),
            "windows": self.windows,
            "tokenize_seconds": round(self.tokenize_s, 6),
            "infer_seconds": round(self.infer_s, 6),
            "decode_seconds": round(self.decode_s, 6),
        }
        return {name: value for name, value in found.items() if value}


def route_of(scope: Mapping[str, Any]) -> str:
    """The route that took a request, as metrics and logs name it: never the address, which may hold anything."""
    path = getattr(scope.get("route"), "path", None)
    return path or ("/static" if scope["path"].startswith("/static/") else "unmatched")


current_record: ContextVar[RequestRecord] = ContextVar("current_record", default=RequestRecord())  # noqa: B039
"""The record of the request being handled; outside of any, as in a probe of a new version, one that nobody reads."""
