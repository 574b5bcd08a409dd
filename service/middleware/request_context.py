"""Give each request an id and a `RequestContext`, and each response the id."""

import os
import re
from itertools import count

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.observability.request_context import RequestContext, request_context

_SANE_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class RequestContextMiddleware:
    """Must be the outermost middleware: all other code reads the context that it sets."""

    def __init__(self, app: ASGIApp, *, keeps_texts: bool) -> None:
        """Wrap an application.

        Args:
            app: the application.
            keeps_texts: whether request contexts may keep questions and texts for the log.
        """
        self.app = app
        self._keeps_texts = keeps_texts
        # Ids are unique, not secret: a random prefix for each process, and a counter.
        self._prefix = os.urandom(12).hex().encode()
        self._numbers = count()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = _given_id(scope) or b"%b%08x" % (self._prefix, next(self._numbers))
        # This task runs only this request, so the variable needs no reset.
        request_context.set(RequestContext(request_id.decode(), keeps_texts=self._keeps_texts))
        header = (b"x-request-id", request_id)

        async def named_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), header]
            await send(message)

        await self.app(scope, receive, named_send)


def _given_id(scope: Scope) -> bytes | None:
    """Return the id in the request headers: from the client, or else from an AWS load balancer."""
    own = trace = b""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            own = value
        elif name == b"x-amzn-trace-id":
            trace = value
    for candidate in (own, trace):
        if candidate and _SANE_ID.fullmatch(candidate):
            return candidate
    return None
