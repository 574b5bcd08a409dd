"""Allow requests from pages of other origins (CORS), as in the settings."""

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.deadline import DEADLINE_HEADER
from service.api.errors import CrossOriginRefused, respond


class CrossOriginMiddleware(CORSMiddleware):
    """Starlette's CORS middleware, but rejections are errors of our API and are counted."""

    def __init__(self, app: ASGIApp, *, origins: tuple[str, ...]) -> None:
        """Wrap an application; pages of these origins may send requests."""
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-api-key", "x-request-id", DEADLINE_HEADER],
            expose_headers=["x-request-id", "server-timing", "retry-after"],
            max_age=600,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        try:
            await super().__call__(scope, receive, send)
        except CrossOriginRefused as error:
            await respond(scope, error)(scope, receive, send)

    def preflight_response(self, request_headers: Headers) -> Response:
        """Answer a preflight request.

        Raises:
            CrossOriginRefused: it is not allowed; the message says why.
        """
        response = super().preflight_response(request_headers)
        if response.status_code != 200:
            raise CrossOriginRefused(bytes(response.body).decode())
        return response
