"""Between HTTP and an answer: read a JSON body strictly, keep the deadline, stop when the client has gone."""

import asyncio
import json
import re
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NoReturn, TypeVar

from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from bertqa.errors import InvalidArgument
from service.api.errors import MalformedBody, NotJson
from service.inference.memory import Account
from service.inference.pipeline import Answering, Pipeline
from service.inference.question import Result
from service.inference.worker_pool import LARGE_BYTES

T = TypeVar("T")

DEADLINE_HEADER = "x-timeout-ms"
MAX_TIMEOUT_MS = 999_999_999
DEADLINE_PARAMETER = {
    "parameters": [
        {
            "in": "header",
            "name": DEADLINE_HEADER,
            "schema": {"type": "integer", "minimum": 1, "maximum": MAX_TIMEOUT_MS},
            "description": "Milliseconds allowed for the answer, where less than the service allows by itself.",
        }
    ]
}
"""How OpenAPI writes the header; read by `deadline_of`, for a declared parameter would cost every request."""
MAX_NAMES = 64
"""Names in one JSON object of a request; the largest that has a meaning has nine."""
MAX_VALUES = 20_000
"""Values in all lists and objects of a body together; more only where the settings allow larger questions."""
_CHARSET = re.compile(r"""\bcharset\s*=\s*["']?([^"';\s]*)""")


class JsonRequest(Request):
    """A request whose body is read as RFC 8259 has it: UTF-8, no NaN, and no name twice in an object."""

    async def json(self) -> Any:
        """The body's value.

        Raises:
            NotJson: the content type is another, or the body is compressed or declared to be in another charset.
            MalformedBody: the body is not JSON; the message says where.
        """
        if not hasattr(self, "_json"):
            media_type, _, options = self.headers.get("content-type", "").lower().partition(";")
            media_type = media_type.strip()
            if media_type != "application/json" and not media_type.endswith("+json"):
                raise NotJson(f"content-type: must be application/json; got {media_type[:100] or 'none'}")
            charset = _CHARSET.search(options) if options else None
            if charset and charset[1] not in ("utf-8", "utf8", "us-ascii"):
                raise NotJson(f"content-type: charset must be utf-8, as JSON always is; got {charset[1]:.40}")
            encoding = self.headers.get("content-encoding", "identity")
            if encoding.strip().lower() != "identity":
                raise NotJson(f"content-encoding: must be identity, the body as it is; got {encoding:.40}")
            body = await self.body()
            pipeline = pipeline_of(self)
            settings = pipeline.settings
            # The largest call to /v1/answers: each question with its fields, each context a value of its own.
            most = max(MAX_VALUES, settings.max_questions * (settings.max_contexts + 2 * MAX_NAMES))
            deadline = deadline_of(self, settings.deadline_s)
            self._json = await pipeline.body_workers.run_if_large(
                len(body), lambda check: parse_json(body, most), deadline=deadline
            )
        return self._json


class JsonRoute(APIRoute):
    """A route with a JSON body, read by `JsonRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Parse first: FastAPI keeps the value, but would answer a malformed body in words of its own."""
        handle = super().get_route_handler()

        async def parse_and_handle(request: Request) -> Response:
            if request.method != "POST":
                return await handle(request)
            answering_of(request).check_room()  # before the body is read
            account = pipeline_of(request).memory.open()
            try:
                request = JsonRequest(request.scope, request.receive)
                await request.json()
                response = await handle(request)
                account.add(len(response.body))
            except BaseException:
                account.close()
                raise
            return _Accounted(response, account)

        return parse_and_handle


class _Accounted(Response):
    """A response whose bytes are given back when the client has taken them, and with them those of its request."""

    def __init__(self, response: Response, account: Account) -> None:
        self._response = response
        self._account = account

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""

        async def send_and_wait(message: Message) -> None:
            if message["type"] != "http.response.body" or len(message.get("body", b"")) < LARGE_BYTES:
                await send(message)
                return
            # The server waits for the client before it sends more: so there is more, of no bytes.
            await send({**message, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        try:
            await self._response(scope, receive, send_and_wait)
        finally:
            self._account.close()


def parse_json(body: bytes, max_values: int = MAX_VALUES) -> Any:
    """Parse one JSON value.

    Raises:
        MalformedBody: it is not UTF-8 or not JSON, holds NaN or Infinity, repeats a name, is nested too deeply, or has
            more than ``max_values`` values.
    """
    if _has_more_values(body, max_values):
        raise MalformedBody(f"body: its lists and objects must have at most {max_values:,} values together")
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
    except ValueError as error:  # our own two below, or a number with thousands of digits
        raise MalformedBody(f"body: not JSON, {error}") from None


def _has_more_values(body: bytes, limit: int) -> bool:
    """Whether the lists and objects of JSON have more values than allowed, without parsing it.

    A value follows a comma or the start of a list or object, so these are counted where they are outside of strings.
    """
    if len(body) <= limit:
        return False
    if b"\\" in body:  # what is escaped ends no string
        body = body.replace(b"\\\\", b"__").replace(b'\\"', b"__")
    if body.count(b'"') > 4 * limit:  # two for each name and each value
        return True
    outside = b"".join(body.split(b'"')[::2])
    return sum(map(outside.count, (b",", b"[", b"{"))) > limit


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_NAMES:  # each unknown one would be written up as an error of its own
        raise ValueError(f"an object has more than {MAX_NAMES} names")
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"the name {name[:60]!r} stands twice in an object")
        values[name] = value
    return values


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


_DECODER = json.JSONDecoder(object_pairs_hook=_distinct, parse_constant=_no_constant)


def deadline_of(request: Request, longest_s: float) -> float:
    """The moment, in `time.monotonic` seconds, by which a request that came just now must be answered.

    Raises:
        InvalidArgument: the client's own limit in ``x-timeout-ms`` is not a positive whole number.
    """
    wish = request.headers.get(DEADLINE_HEADER)
    if wish is not None:
        if not (wish.isascii() and wish.isdigit() and len(wish) < 10 and int(wish)):
            raise InvalidArgument(
                (DEADLINE_HEADER,),
                f"must be a whole number of milliseconds from 1 to {MAX_TIMEOUT_MS:,}; got {wish!r:.40}",
            )
        longest_s = min(longest_s, int(wish) / 1000)
    return time.monotonic() + longest_s


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await work, but cancel it when the client closes the connection; uvicorn does not do so by itself.

    The request's body must have been read.

    Raises:
        ClientDisconnect: the client has gone, and the work has ended.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def pipeline_of(request: Request) -> Pipeline:
    """The application's `Pipeline`, there once it has started."""
    pipeline: Pipeline = request.app.state.pipeline
    return pipeline


def answering_of(request: Request) -> Answering:
    """The application's `Pipeline`, or the cache around it."""
    answering: Answering = request.app.state.answering
    return answering


_CACHE_STATUS = {  # of several questions, that of the one which took most
    "miss": "bertqa; fwd=miss; stored",
    "coalesced": "bertqa; fwd=miss; collapsed",
    "hit": "bertqa; hit",
}


def reply_headers(results: Sequence[Result]) -> dict[str, str]:
    """``server-timing`` with the stages, each of the slowest question; ``cache-status`` (RFC 9211) with a cache."""
    stages = ((name, max(getattr(each, f"{name}_s") for each in results)) for name in ("tokenize", "infer", "decode"))
    headers = {"server-timing": ", ".join(f"{name};dur={seconds * 1000:.3f}" for name, seconds in stages)}
    sources = {each.source for each in results}
    for source, status in _CACHE_STATUS.items():
        if source in sources:
            return headers | {"cache-status": status}
    return headers
