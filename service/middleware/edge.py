"""What happens to every request before any route and after all of them, as one plain ASGI middleware.

Starlette's `BaseHTTPMiddleware` would add a task and a memory stream per request, several times what an answer costs
here; this is two closures.
"""

import logging
import re
import time
import uuid
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.errors import BodyTooLarge, error_response
from service.observability import readiness
from service.observability.metrics import Metrics
from service.observability.request_context import RequestRecord, current_record, route_of
from service.runtime.shutdown import Shutdown
from service.settings import Settings

log = logging.getLogger("bertqa.service")
access_log = logging.getLogger("bertqa.access")

_SANE_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_CSP = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# After OWASP's cheat sheet on HTTP headers. Strict-Transport-Security is for whoever ends TLS: we speak plain HTTP.
_HARDENING = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", _CSP),
    (b"permissions-policy", b"camera=(), geolocation=(), microphone=()"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
]
_UNLOGGED = ("/health/", "/metrics")  # asked every few seconds; their failures are logged


class Edge:
    """Bounds the body, names, counts and logs the request, hardens the response, answers what nobody else caught."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, settings: Settings, shutdown: Shutdown) -> None:
        self.app = app
        self.metrics = metrics
        self.max_body_bytes = settings.max_body_bytes
        self.logs = settings.access_log
        self.log_texts = settings.log_texts
        self.shutdown = shutdown

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        request_id, announced = _read_headers(scope)
        record = RequestRecord(request_id.decode(), keeps_texts=self.log_texts)
        current_record.set(record)
        status = received = sent = 0

        async def bounded_receive() -> Message:
            nonlocal received
            if announced > self.max_body_bytes:
                raise BodyTooLarge(self.max_body_bytes)
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self.max_body_bytes:
                    raise BodyTooLarge(self.max_body_bytes)
                if "refusal" in scope:  # by service.runtime.http_protocol, which holds no more of the body
                    raise scope["refusal"]
            return message

        async def named_send(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id), *_HARDENING]
                if self.shutdown.has_begun:
                    message["headers"].append((b"connection", b"close"))
            else:
                sent += len(message.get("body", b""))
            await send(message)

        self.metrics.in_flight.inc()
        try:
            await self.app(scope, bounded_receive, named_send)
        except Exception:
            log.exception("%s %s: request %s failed", scope["method"], route_of(scope), request_id.decode())
            if status:
                raise  # the response has begun; the server can only cut it off
            scope["error_type"] = "internal"
            response = error_response(500, "internal", f"internal error; the log knows it as {request_id.decode()}")
            await response(scope, receive, named_send)
        finally:
            self.metrics.in_flight.dec()
            asked = scope["method"] == "POST" and (status == 200 or status >= 500)  # the engine, most likely
            seconds = time.perf_counter() - started
            route, error_type = route_of(scope), scope.get("error_type")
            self.metrics.requested(route, status, error_type, seconds if asked else None)
            if self.logs and _is_logged(route, status):
                fields = {"method": scope["method"], "route": route, "status": status or None, "error_type": error_type}
                fields |= {"seconds": round(seconds, 6), "received_bytes": received, "sent_bytes": sent}
                if "api_key" in scope:
                    fields["api_key"] = scope["api_key"]  # its name
                _log_access(fields, record)


def _is_logged(route: str, status: int) -> bool:
    if route == readiness.ROUTE:  # `ReadinessLog` logs the others
        return 400 <= status < 500
    return status >= 400 or not route.startswith(_UNLOGGED)


def _log_access(fields: dict[str, Any], record: RequestRecord) -> None:
    fields |= record.fields()
    if record.questions:
        fields["questions"] = [{"question": question, "contexts": contexts} for question, contexts in record.questions]
    access_log.info("%s %s %s", fields["method"], fields["route"], fields["status"], extra={"fields": fields})


def _read_headers(scope: Scope) -> tuple[bytes, int]:
    """The request's name, made up if the client gave no sane one, and the announced length of its body, 0 if none."""
    own = trace = b""
    announced = 0
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            own = value
        elif name == b"x-amzn-trace-id":
            trace = value
        elif name == b"content-length" and value.isdigit():
            announced = int(value[:20])  # more than that is too large at any rate
    for candidate in (own, trace):
        if _SANE_ID.fullmatch(candidate):
            return candidate, announced
    return uuid.uuid4().hex.encode(), announced
