"""The errors of requests, one table from exception to HTTP status, and the replies.

Invalid fields raise `bertqa.errors.InvalidArgument` (422) everywhere. Errors of the engine are
`service.triton.errors.EngineError`. The rest is this tree::

    RequestError               the client can fix it
    ├── MalformedHttp          400, not HTTP
    ├── MalformedBody          400, not JSON
    ├── CrossOriginRefused     400, a CORS preflight request that is not allowed
    ├── Unauthorized           401, no valid API key
    ├── NoSuchModel            404, in the URL
    ├── SlowRequest            408, it did not arrive in time
    ├── BodyTooLarge           413
    ├── NotJson                415, by its content type or encoding
    ├── RateLimited            429, an API key exceeds its rate
    ├── HeadTooLarge           431
    ├── BodiesOverloaded       503
    └── TooManyConnections     503
"""

import json
import logging
import math
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import Scope

from bertqa.errors import InvalidArgument, Location, render
from bertqa.manifest import BundleMismatch
from bertqa.spans import InvalidLogits
from service.observability import readiness
from service.observability.request_context import request_context, route_of
from service.triton.errors import EngineBroken, EngineError, EngineOverloaded, EngineTimeout, EngineUnavailable

log = logging.getLogger("bertqa.service")


class RequestError(Exception):
    """The request cannot be answered as sent; the message is a sentence for the client."""

    headers: Mapping[str, str] = {}
    """Additional headers of the response."""


class MalformedHttp(RequestError):
    """The bytes are not an HTTP request, or not one that the service can answer."""


class HeadTooLarge(RequestError):
    """The request line and headers have more bytes than allowed."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"headers: must be at most {limit:,} bytes, including the URL")


class TooManyConnections(RequestError):
    """Too many connections are open, and none of them is idle."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"{limit:,} connections are open, which is the limit")


class MalformedBody(RequestError):
    """The body is not one JSON value in UTF-8."""


class CrossOriginRefused(RequestError):
    """A browser's CORS preflight request: the origin, method or header is not allowed."""

    headers: Mapping[str, str] = {"vary": "Origin"}


class Unauthorized(RequestError):
    """The API key is missing or unknown, or its header is repeated."""

    headers: Mapping[str, str] = {"www-authenticate": 'Bearer realm="bertqa"'}


class RateLimited(RequestError):
    """An API key exceeds its rate limit."""

    def __init__(self, name: str, rate: float, unit: str, wait_s: float) -> None:
        """Set the name and rate of the key (units per second), and the seconds until the next unit."""
        super().__init__(
            f"the API key {name} may use {rate:g} {unit}s per second; the next is available in {wait_s:.3g} s"
        )
        self.headers = {"retry-after": str(math.ceil(wait_s))}


class NoSuchModel(RequestError):
    """The URL names a model that is not served."""


class SlowRequest(RequestError):
    """The request did not arrive in time."""

    headers: Mapping[str, str] = {"connection": "close"}

    def __init__(self, limit_s: float) -> None:
        super().__init__(f"request: must arrive within {limit_s:g} s")


class BodyTooLarge(RequestError):
    """The body has more bytes than allowed."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"body: must be at most {limit:,} bytes")


class BodiesOverloaded(RequestError):
    """The bodies of all requests in progress exceed the limit of the process."""

    headers: Mapping[str, str] = {"connection": "close"}

    def __init__(self, limit: int) -> None:
        super().__init__(f"body: the bodies of all requests in progress exceed {limit:,} bytes; try again later")


class NotJson(RequestError):
    """The content type is not JSON in UTF-8, or the body is compressed."""


class Stopping(Exception):
    """The service is shutting down; only the readiness probe reports it."""


STATUS: Mapping[type[Exception], tuple[int, str]] = {
    MalformedHttp: (400, "malformed_http"),
    MalformedBody: (400, "malformed_json"),
    CrossOriginRefused: (400, "cross_origin"),
    Unauthorized: (401, "unauthorized"),
    NoSuchModel: (404, "not_found"),
    SlowRequest: (408, "slow_request"),
    BodyTooLarge: (413, "body_too_large"),
    NotJson: (415, "not_json"),
    InvalidArgument: (422, "validation"),
    RateLimited: (429, "rate_limited"),
    HeadTooLarge: (431, "head_too_large"),
    ClientDisconnect: (499, "client_disconnected"),  # no client reads it, but metrics count it
    EngineOverloaded: (503, "engine_overloaded"),
    EngineUnavailable: (503, "engine_unavailable"),
    EngineBroken: (503, "engine_broken"),
    EngineError: (503, "engine_broken"),
    InvalidLogits: (503, "engine_broken"),
    BundleMismatch: (503, "engine_mismatch"),
    Stopping: (503, "stopping"),
    BodiesOverloaded: (503, "bodies_overloaded"),
    TooManyConnections: (503, "too_many_connections"),
    EngineTimeout: (504, "engine_timeout"),
}
"""Status and ``error_type`` of each exception that routes raise; any other exception is 500 ``internal``."""

_KNOWN = (*STATUS, HTTPException, RequestValidationError)
_ROUTING = {404: "not_found", 405: "method_not_allowed"}


def error_response(
    status: int, error_type: str, message: str, *, field: str | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    """Make the response for an error."""
    body = json.dumps({"error": message, "error_type": error_type, "field": field})
    if status in (503, 504):
        headers = {"retry-after": "1", **(headers or {})}
    return Response(body, status, headers, "application/json")


def respond(scope: Scope, error: Exception) -> Response:
    """Make the response for an exception that `is_known`, and record it for metrics and log."""
    if isinstance(error, RequestValidationError):
        error = first_problem(error.errors())
    if isinstance(error, HTTPException):
        return _of_starlette(scope, error)
    status, error_type = next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)
    context = request_context.get()
    context.error_type = error_type
    field = render(error.location) if isinstance(error, InvalidArgument) else None
    headers = getattr(error, "headers", None)
    if isinstance(error, EngineOverloaded):  # counted, but not logged: rejecting must stay cheap
        headers = {"retry-after": str(max(math.ceil(error.retry_after_s), 1))}
    elif status >= 500 and not isinstance(error, BodiesOverloaded) and route_of(scope) != readiness.ROUTE:
        shown = error if context.keeps_texts else getattr(error, "plain", error)
        log.warning("%s %s: %s: %s", scope["method"], route_of(scope), error_type, shown)
    return error_response(status, error_type, str(error), field=field, headers=headers)


def is_known(error: Exception) -> bool:
    """Return whether `respond` handles an exception: those in the table, and those of FastAPI and Starlette."""
    return isinstance(error, _KNOWN)


def _of_starlette(scope: Scope, error: HTTPException) -> Response:
    """Make the response for an unknown URL or method."""
    error_type = _ROUTING.get(error.status_code, "http")
    request_context.get().error_type = error_type
    message = f"{scope['method']} {scope['path']:.200}: {error.detail.lower()}; see /docs"
    headers = dict(error.headers or {})
    if error.status_code == 405:  # Starlette lists only the methods of the first route with this path
        routes = [route for route in scope["app"].routes if route.matches(scope)[0] is not Match.NONE]
        methods = {method for route in routes for method in getattr(route, "methods", None) or ()}
        headers = {"allow": ", ".join(sorted(methods.union(headers.get("Allow", "").split(", ")) - {""}))}
    return error_response(error.status_code, error_type, message, headers=headers)


def first_problem(errors: Iterable[Any]) -> InvalidArgument:
    """Turn the first of pydantic's errors into a plain sentence with the field as the client wrote it."""
    found = next(iter(errors))
    location: Location = found["loc"]
    if location[:1] == ("body",):  # added by FastAPI
        location = location[1:]
    kind, limits, value = found["type"], found.get("ctx", {}), found.get("input")
    if kind == "value_error":  # raised by our validators
        own = limits["error"]
        return own.within(*location) if isinstance(own, InvalidArgument) else InvalidArgument(location, str(own))
    shown = _SHORT.repr(value)
    problems = {
        "missing": "required",
        "extra_forbidden": "unknown field; /docs lists the fields",
        "string_type": "must be a string",
        "string_unicode": "not valid Unicode, it contains a lone surrogate",
        "int_type": "must be a whole number",
        "int_parsing": "must be a whole number",
        "int_from_float": "must be a whole number",
        "bool_type": "must be true or false",
        "bool_parsing": "must be true or false",
        "list_type": "must be a list",
        "dict_type": "must be a JSON object",
        "model_type": "must be a JSON object",
        "model_attributes_type": "must be a JSON object",
        "literal_error": f"must be one of {limits.get('expected')}; got {shown}",
        "greater_than_equal": f"must be at least {limits.get('ge')}; got {shown}",
        "less_than_equal": f"must be at most {limits.get('le')}; got {shown}",
        "string_too_short": "must not be empty",
        "too_short": "must not be empty",
    }
    return InvalidArgument(location, problems.get(kind, found["msg"]))


_SHORT = reprlib.Repr()  # values may be large, or nested too deeply for `repr`
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxlong, _SHORT.maxother = 2, 40, 40, 40
