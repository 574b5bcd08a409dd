"""Bounds the body of a request before anything is parsed, by what it announces and by what arrives."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.errors import BodyTooLarge
from service.observability.request_context import request_context


class BodyLimitMiddleware:
    """Raises `BodyTooLarge`, or what the HTTP protocol holds against the body, in whoever reads it."""

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self.app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        context, max_bytes = request_context.get(), self._max_bytes
        announced = _announced(scope)

        async def bounded_receive() -> Message:
            if announced > max_bytes:
                raise BodyTooLarge(max_bytes)
            message = await receive()
            if message["type"] == "http.request":
                context.received_bytes += len(message.get("body", b""))
                if context.received_bytes > max_bytes:
                    raise BodyTooLarge(max_bytes)
                if "refusal" in scope:  # by `service.runtime.http_protocol`, which holds no more of the body
                    raise scope["refusal"]
            return message

        await self.app(scope, bounded_receive, send)


def _announced(scope: Scope) -> int:
    """Return the length that the request announces for its body, 0 if none."""
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value[:20])  # more than that is too large at any rate
    return 0
