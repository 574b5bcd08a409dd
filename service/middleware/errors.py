"""Turn exceptions from routes and inner middleware into error responses of the API."""

import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.errors import error_response, is_known, respond
from service.observability.request_context import request_context, route_of

log = logging.getLogger("bertqa.service")


class ErrorMiddleware:
    """Must be inside all middleware that adds headers, and outside all code that raises."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        has_begun = False

        async def noted_send(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self.app(scope, receive, noted_send)
        except Exception as error:
            context = request_context.get()
            if is_known(error) and not has_begun:
                response = respond(scope, error)
                error.__traceback__ = None  # its frames keep the body in memory until the client has read the reply
            else:
                context.error_type = "internal"
                log.exception("%s %s: request %s failed", scope["method"], route_of(scope), context.request_id)
                if has_begun:
                    raise  # the response has begun; the server can only close the connection
                message = f"internal error; find it in the log by the request id {context.request_id}"
                response = error_response(500, "internal", message)
            await response(scope, receive, send)
