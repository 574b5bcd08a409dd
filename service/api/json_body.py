"""Read JSON bodies as in RFC 8259, and serve the routes that take one.

FastAPI describes these routes but does not serve them: its dependencies, exit stacks and two validations of the reply
cost more than tokenizing the question. A route here reads the body, validates it once and calls the endpoint.
"""

import json
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NoReturn, TypeVar, get_type_hints

from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.deadline import deadline_of
from service.api.errors import MalformedBody, NotJson, first_problem
from service.api.reply import Reply
from service.services import services_of

T = TypeVar("T")

MAX_NAMES = 64
"""Limit on the names in a JSON object; the largest object of the API has nine."""
MAX_VALUES = 20_000
"""Limit on the values in all lists and objects of a body; higher if the settings allow larger questions."""

_CHARSET = re.compile(r"""\bcharset\s*=\s*["']?([^"';\s]*)""")


class JsonRoute(APIRoute):
    """A route with a JSON body; its endpoint takes the body, as a pydantic model, and the request.

    GET routes of the same router are served by FastAPI.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        """Find the pydantic model in the annotations of the endpoint."""
        models = [each for each in get_type_hints(endpoint).values() if _is_model(each)]
        self._model: type[BaseModel] | None = models[0] if "POST" in (options.get("methods") or ()) else None
        super().__init__(path, endpoint, **options)

    @property
    def takes_body(self) -> bool:
        """Whether `serve` may be called."""
        return self._model is not None

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
        """Return the handler for FastAPI's router."""
        return self.serve if self._model else super().get_route_handler()

    async def serve(self, request: Request) -> Response:
        """Read and validate the body, and call the endpoint.

        Raises:
            EngineOverloaded: the request would be rejected in any case; its body is not read.
            NotJson, MalformedBody: as in `read_json`.
            InvalidArgument: the body does not fit the model.
        """
        assert self._model
        services = services_of(request)
        services.answering.check_room()
        account = services.pipeline.memory.open()
        try:
            value = await read_json(request)
            try:
                query = self._model.model_validate(value)
            except ValidationError as error:
                raise first_problem(error.errors(include_url=False)) from None
            reply: Reply = await self.endpoint(query, request, **request.path_params)
            account.add(len(reply.body))
            reply.account = account
        except BaseException:
            account.close()
            raise
        return reply


class JsonRoutes:
    """ASGI middleware that finds routes without path parameters by one table lookup.

    Starlette's router would try regular expressions one by one, inside three more layers.
    """

    def __init__(self, app: ASGIApp, *, routes: Sequence[BaseRoute]) -> None:
        """Wrap the application that serves all other routes."""
        self.app = app
        self._routes = {
            each.path: each
            for each in routes
            if isinstance(each, JsonRoute) and each.takes_body and "{" not in each.path
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        route = self._routes.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if route is None:
            await self.app(scope, receive, send)
            return
        scope["route"] = route
        reply = await route.serve(Request(scope, receive))
        await reply(scope, receive, send)


def _is_model(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


async def read_json(request: Request) -> Any:
    """Read the body of a request.

    Raises:
        NotJson: the content type is not JSON, the charset is not UTF-8, or the body is compressed.
        MalformedBody: the body is not JSON; the message says where.
        ClientDisconnect: the client disconnected before the body was complete.
    """
    _check_headers(request.scope["headers"])
    body = await _read(request.receive)
    services = services_of(request)
    settings = services.settings
    # The largest call to /v1/answers: each field of each question, and each context, is a value.
    most = max(MAX_VALUES, settings.max_questions * (settings.max_contexts + 2 * MAX_NAMES))
    return await services.pipeline.body_workers.run_if_large(
        len(body), lambda check: parse_json(body, most), deadline=deadline_of(request, settings.deadline_s)
    )


def _check_headers(headers: Sequence[tuple[bytes, bytes]]) -> None:
    content_type, encoding = b"", b"identity"
    for name, value in reversed(headers):  # the first of several counts
        if name == b"content-type":
            content_type = value
        elif name == b"content-encoding":
            encoding = value
    if content_type != b"application/json":
        media_type, _, options = content_type.decode("latin-1").lower().partition(";")
        media_type = media_type.strip()
        if media_type != "application/json" and not media_type.endswith("+json"):
            raise NotJson(f"content-type: must be application/json; got {media_type[:100] or 'none'}")
        charset = _CHARSET.search(options) if options else None
        if charset and charset[1] not in ("utf-8", "utf8", "us-ascii"):
            raise NotJson(f"content-type: charset must be utf-8; got {charset[1]:.40}")
    if encoding.strip().lower() != b"identity":
        shown = encoding.decode("latin-1")
        raise NotJson(f"content-encoding: must be absent or identity; got {shown:.40}")


async def _read(receive: Receive) -> bytes:
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return parts[0] if len(parts) == 1 else b"".join(parts)


def parse_json(body: bytes, max_values: int = MAX_VALUES) -> Any:
    """Parse one JSON value.

    Raises:
        MalformedBody: it is not UTF-8 or not JSON, has NaN or Infinity, repeats a name, is nested too deeply, or has
            more than ``max_values`` values.
    """
    if _has_more_values(body, max_values):
        raise MalformedBody(f"body: must have at most {max_values:,} values in all its lists and objects")
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MalformedBody(f"body: not UTF-8 at byte {error.start}") from None
    if not text.strip():
        raise MalformedBody("body: empty; send a JSON object")
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise MalformedBody(f"body: not JSON, {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise MalformedBody("body: nested too deeply") from None
    except ValueError as error:  # raised below, or for a number with thousands of digits
        raise MalformedBody(f"body: not JSON, {error}") from None


def _has_more_values(body: bytes, limit: int) -> bool:
    """Return whether the lists and objects of JSON have more values than allowed, without parsing it.

    A value follows a comma or the start of a list or object, so count these outside strings.
    """
    if len(body) <= limit:
        return False
    if b"\\" in body:  # an escaped quote does not end a string
        body = body.replace(b"\\\\", b"__").replace(b'\\"', b"__")
    if body.count(b'"') > 4 * limit:  # two quotes for each name and each value
        return True
    outside = b"".join(body.split(b'"')[::2])
    return sum(map(outside.count, (b",", b"[", b"{"))) > limit


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_NAMES:  # pydantic would report each unknown one as an error
        raise ValueError(f"an object has more than {MAX_NAMES} names")
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"the name {name[:60]!r} is repeated in an object")
        values[name] = value
    return values


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


_DECODER = json.JSONDecoder(object_pairs_hook=_distinct, parse_constant=_no_constant)
