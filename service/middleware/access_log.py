"""Count every request and log a line for it, after the reply has been sent."""

import logging
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.observability import readiness
from service.observability.metrics import Metrics
from service.observability.request_context import RequestContext, request_context, route_of

log = logging.getLogger("bertqa.access")

_UNLOGGED = ("/health/", "/metrics")  # requested every few seconds; only failures are logged


class AccessLogMiddleware:
    """Must be directly inside `RequestContextMiddleware`, so that it sees every reply as it is sent."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, logs: bool) -> None:
        """Wrap an application.

        Args:
            app: the application.
            metrics: counts every request.
            logs: whether to log a line for each request.
        """
        self.app = app
        self._metrics = metrics
        self._logs = logs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        status = sent = 0

        async def counted_send(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                sent += len(message.get("body", b""))
            await send(message)

        self._metrics.in_flight.inc()
        try:
            await self.app(scope, receive, counted_send)
        finally:
            seconds = time.perf_counter() - started
            self._metrics.in_flight.dec()
            asked = scope["method"] == "POST" and (
                status == 200 or status >= 500
            )  # most likely a request to the engine
            route, context = route_of(scope), request_context.get()
            self._metrics.requested(route, status, context.error_type, seconds if asked else None)
            if self._logs and _is_logged(route, status) and log.isEnabledFor(logging.INFO):
                _log(scope["method"], route, status, seconds, sent, context)


def _is_logged(route: str, status: int) -> bool:
    if route == readiness.ROUTE:  # `ReadinessLog` logs failures
        return 400 <= status < 500
    return status >= 400 or not route.startswith(_UNLOGGED)


def _log(method: str, route: str, status: int, seconds: float, sent: int, context: RequestContext) -> None:
    shown = status or None
    fields: dict[str, Any] = {
        "method": method,
        "route": route,
        "status": shown,
        "error_type": context.error_type,
        "seconds": round(seconds, 6),
        "received_bytes": context.received_bytes,
        "sent_bytes": sent,
    }
    if context.api_key is not None:
        fields["api_key"] = context.api_key
    fields |= context.fields()
    if context.questions:
        fields["questions"] = [{"question": question, "contexts": contexts} for question, contexts in context.questions]
    # `log.info` would walk the stack to find the line of this call, which is not needed.
    record = logging.LogRecord(log.name, logging.INFO, "", 0, "%s %s %s", (method, route, shown), None)
    record.fields = fields
    log.handle(record)
