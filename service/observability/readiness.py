"""Log readiness only when it changes, because probes run many times a minute."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger("bertqa.service")

ROUTE = "/health/ready"
"""Route of readiness probes; only this module logs its failures."""


class ReadinessLog:
    """Remembers, for each model, why its last probe failed."""

    def __init__(self) -> None:
        """Start without a failure."""
        self._failures: dict[str, str] = {}

    @contextmanager
    def probing(self, model: str) -> Iterator[None]:
        """Log the outcome of a probe if it differs from that of the previous one."""
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
