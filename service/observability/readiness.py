"""What readiness probes find, logged when it changes: they come many times a minute for as long as it lasts."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger("bertqa.service")

ROUTE = "/health/ready"
"""The route whose failures are logged here, and neither as requests nor as errors."""


class ReadinessLog:
    """Remembers, for each model, why its last probe failed."""

    def __init__(self) -> None:
        """Begin without a failure."""
        self._failures: dict[str, str] = {}

    @contextmanager
    def probing(self, model: str) -> Iterator[None]:
        """Log how a probe ends, if the one before it ended otherwise."""
        try:
            yield
        except Exception as error:
            kind = type(error).__name__
            if self._failures.get(model) != kind:
                log.warning("not ready (model %s): %s", model, getattr(error, "plain", error))
            self._failures[model] = kind
            raise
        if self._failures.pop(model, None):
            log.warning("ready again (model %s)", model)
