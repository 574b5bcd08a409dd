"""Limit request bodies before they are parsed, by their announced length and by the bytes that arrive."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.errors import BodyTooLarge
from service.observability.request_context import request_context


class BodyLimitMiddleware:
    """Raises `BodyTooLarge`, or the error that the HTTP protocol set for the body, in the code that reads it."""

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
                if "refusal" in scope:  # set by `service.runtime.http_protocol`, which has dropped the body
                    raise scope["refusal"]
            return message

        await self.app(scope, bounded_receive, send)


def _announced(scope: Scope) -> int:
    """Return the announced length of the body; 0 if there is none."""
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value[:20])  # longer numbers are too large anyway
    return 0
