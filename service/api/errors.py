"""Everything that can go wrong with a request, the one table from exception to HTTP status, and the reply to each.

Fields that are not acceptable are `bertqa.errors.InvalidArgument`, 422, wherever they are found; errors of the engine's
side are `service.triton.errors.EngineError`. The rest is this tree::

    RequestError               what the client can mend
    ├── MalformedHttp          400, not HTTP
    ├── MalformedBody          400, not JSON
    ├── CrossOriginRefused     400, a browser asks whether a page may ask, and it may not
    ├── Unauthorized           401, without a key that is known
    ├── NoSuchModel            404, of the address
    ├── SlowRequest            408, did not arrive in time
    ├── BodyTooLarge           413
    ├── NotJson                415, content type or encoding say so
    ├── RateLimited            429, a key is used more often than it may be
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
    """A request that cannot be answered as it is; the message is a sentence for whoever sent it."""

    headers: Mapping[str, str] = {}
    """That the response has besides."""


class MalformedHttp(RequestError):
    """What came is not an HTTP request, or not one that can be answered."""


class HeadTooLarge(RequestError):
    """The request's line and headers have more bytes than allowed."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"headers: must be at most {limit:,} bytes, the address included")


class TooManyConnections(RequestError):
    """More connections are open than may be, and none of them is idle."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"{limit:,} connections are open, which is the limit")


class MalformedBody(RequestError):
    """The body is not one JSON value in UTF-8."""


class CrossOriginRefused(RequestError):
    """A browser asked whether a page of that origin may ask in that way, and it may not."""

    headers: Mapping[str, str] = {"vary": "Origin"}


class Unauthorized(RequestError):
    """No API key came along, or none that is known."""

    headers: Mapping[str, str] = {"www-authenticate": 'Bearer realm="bertqa"'}


class RateLimited(RequestError):
    """An API key is used more often than it may be."""

    def __init__(self, name: str, rate: float, unit: str, wait_s: float) -> None:
        """Say how long to wait, in seconds, for the next unit of a key that has so many a second."""
        super().__init__(f"the API key {name} has {rate:g} {unit}s a second; the next is free in {wait_s:.3g} s")
        self.headers = {"retry-after": str(math.ceil(wait_s))}


class NoSuchModel(RequestError):
    """The address names a model that is not served."""


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
    """The bodies of all requests in progress have more bytes together than the process may hold."""

    headers: Mapping[str, str] = {"connection": "close"}

    def __init__(self, limit: int) -> None:
        super().__init__(f"body: all requests in progress may have {limit:,} bytes together; try again later")


class NotJson(RequestError):
    """The content type is not JSON in UTF-8, or the body is compressed."""


class Stopping(Exception):
    """The process has been told to end; said by the readiness probe alone."""


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
    ClientDisconnect: (499, "client_disconnected"),  # nobody reads it, but the metrics count it
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
"""Status and ``error_type`` of every exception that a route lets out; any other one is 500 ``internal``."""

_KNOWN = (*STATUS, HTTPException, RequestValidationError)
_ROUTING = {404: "not_found", 405: "method_not_allowed"}


def error_response(
    status: int, error_type: str, message: str, *, field: str | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    """Write an error in the API's one shape."""
    body = json.dumps({"error": message, "error_type": error_type, "field": field})
    if status in (503, 504):
        headers = {"retry-after": "1", **(headers or {})}
    return Response(body, status, headers, "application/json")


def respond(scope: Scope, error: Exception) -> Response:
    """Answer an exception that `is_known`, and let metrics and log know."""
    if isinstance(error, RequestValidationError):
        error = first_problem(error.errors())
    if isinstance(error, HTTPException):
        return _of_starlette(scope, error)
    status, error_type = next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)
    context = request_context.get()
    context.error_type = error_type
    field = render(error.location) if isinstance(error, InvalidArgument) else None
    headers = getattr(error, "headers", None)
    if isinstance(error, EngineOverloaded):  # counted, but not logged one by one: refusing must stay cheap
        headers = {"retry-after": str(max(math.ceil(error.retry_after_s), 1))}
    elif status >= 500 and not isinstance(error, BodiesOverloaded) and route_of(scope) != readiness.ROUTE:
        told = error if context.keeps_texts else getattr(error, "plain", error)
        log.warning("%s %s: %s: %s", scope["method"], route_of(scope), error_type, told)
    return error_response(status, error_type, str(error), field=field, headers=headers)


def is_known(error: Exception) -> bool:
    """Return whether `respond` answers an exception: one of the table, or FastAPI's and Starlette's own."""
    return isinstance(error, _KNOWN)


def _of_starlette(scope: Scope, error: HTTPException) -> Response:
    """Answer what Starlette's router refuses: an address or a method that is not there."""
    error_type = _ROUTING.get(error.status_code, "http")
    request_context.get().error_type = error_type
    message = f"{scope['method']} {scope['path']:.200}: {error.detail.lower()}; see /docs"
    headers = dict(error.headers or {})
    if error.status_code == 405:  # Starlette names the methods of the first route of this path alone
        there = [route for route in scope["app"].routes if route.matches(scope)[0] is not Match.NONE]
        methods = {method for route in there for method in getattr(route, "methods", None) or ()}
        headers = {"allow": ", ".join(sorted(methods.union(headers.get("Allow", "").split(", ")) - {""}))}
    return error_response(error.status_code, error_type, message, headers=headers)


def first_problem(errors: Iterable[Any]) -> InvalidArgument:
    """Say the first of pydantic's findings in a plain sentence that names the field as a client would write it."""
    found = next(iter(errors))
    location: Location = found["loc"]
    if location[:1] == ("body",):  # FastAPI's own, for the parameter
        location = location[1:]
    kind, limits, value = found["type"], found.get("ctx", {}), found.get("input")
    if kind == "value_error":  # raised by a validator of ours
        own = limits["error"]
        return own.within(*location) if isinstance(own, InvalidArgument) else InvalidArgument(location, str(own))
    shown = _SHORT.repr(value)
    problems = {
        "missing": "required",
        "extra_forbidden": "unknown field; see /docs for those that there are",
        "string_type": "must be a string",
        "string_unicode": "not valid Unicode, it holds a lone surrogate",
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


_SHORT = reprlib.Repr()  # a client's value may be large, or nested more deeply than `repr` can follow
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxlong, _SHORT.maxother = 2, 40, 40, 40
