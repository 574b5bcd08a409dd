"""Close connections during shutdown, so that the next request of a client reaches another replica."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.shutdown import Shutdown


class DrainingMiddleware:
    """Adds ``connection: close`` to every response after SIGTERM."""

    def __init__(self, app: ASGIApp, *, shutdown: Shutdown) -> None:
        self.app = app
        self._shutdown = shutdown

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def last_send(message: Message) -> None:
            if message["type"] == "http.response.start" and self._shutdown.has_begun:
                message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
            await send(message)

        await self.app(scope, receive, last_send)
