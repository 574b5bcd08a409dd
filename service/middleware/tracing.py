"""Create a server span for each request, except probes, scrapes and static files."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.observability import tracing
from service.observability.request_context import request_context, route_of

_UNTRACED = ("/health/", "/metrics", "/static/")


class TracingMiddleware:
    """Must be outside `ErrorMiddleware`, which records how a request failed."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http" or not tracing.is_on() or scope["path"].startswith(_UNTRACED):
            await self.app(scope, receive, send)
            return
        status = 0

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        with tracing.server_span(scope) as span:
            context = request_context.get()
            context.trace_id = f"{span.get_span_context().trace_id:032x}"
            try:
                await self.app(scope, receive, watched_send)
            except Exception:
                status = 500
                raise
            finally:
                tracing.end_server_span(span, scope["method"], route_of(scope), status, context)
