"""Generate invalid API keys and foreign origins; none may get access, and no key may leak.

As in `tests.chaos.bad_input`, the real application runs in this process without an engine, and the requests are the
inputs.
"""

import contextlib
import json
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from service.api_keys import new_key
from service.observability.logging import JsonFormatter
from tests.chaos.bad_input import (
    BODIES,
    HEADER_BYTES,
    REFUSALS,
    Reply,
    Service,
    Targets,
    check,
    check_refusal,
    described,
    explore,
    generate,
)
from tests.chaos.report import Row, Size
from tests.chaos.toy_service import application

GUARDED = {**REFUSALS, 401: "unauthorized", 404: "not_found", 405: "method_not_allowed", 429: "rate_limited"}
CROSS_ORIGIN = {**GUARDED, 400: "cross_origin"}
RIGHT_BODIES: Mapping[str, Any] = dict(reversed(BODIES))
SECRET_CHARS = 12
"""Length of a substring of a key that no reply and no log line may contain, in any case."""
UNAUTHORIZED = {
    "an API key is required; send authorization: Bearer KEY, or x-api-key: KEY",
    "unknown API key",
    "authorization: the header is repeated",
    "x-api-key: the header is repeated",
}
"""All messages about a wrong key."""
_BREAKS = re.compile(rb"[\r\n\0]")


def _header(value: bytes) -> bytes:
    return _BREAKS.sub(b"", value)


@dataclass(frozen=True, slots=True)
class Stranger:
    """A request with a valid body, and the statuses allowed for its headers."""

    method: str
    target: str
    headers: tuple[tuple[bytes, bytes], ...]
    statuses: frozenset[int]


def _ask(service: Service, row: Row, asked: Stranger, refusals: Mapping[int, str]) -> Reply:
    body, headers = b"", asked.headers
    if asked.method == "POST":
        body = json.dumps(RIGHT_BODIES.get(asked.target, RIGHT_BODIES["/"])).encode()
        headers += ((b"content-type", b"application/json"),)
    reply = service.ask(asked.target.encode(), body, headers, asked.method)
    check(row, reply, refusals)
    row.right += reply.status == 200
    row.wrong += reply.status not in asked.statuses
    assert reply.status in asked.statuses, (asked, reply.status)
    if reply.status != 200 and asked.method != "HEAD":
        check_refusal(reply, refusals)
    assert ("www-authenticate" in reply.headers) == (reply.status == 401)
    assert reply.status != 429 or int(reply.headers["retry-after"]) > 0
    return reply


# ---- API keys ------------------------------------------------------------------------------------------------------

GUARDED_TARGETS = (
    *(("POST", target, 200) for target in ("/v1/answer", "/v1/answers", "/", "/predict", "/models/x")),
    *(("GET", target, 200) for target in ("/info", "/metrics", "/openapi.json", "/v1/models")),
    *(("GET", "/no/such", 404), ("GET", "/v1/answer", 405), ("PUT", "/health/live", 405)),
)
OPEN_TARGETS = (("GET", "/health/live", 200), ("GET", "/health/ready", 200), ("GET", "/", 200), ("HEAD", "/", 200))
"""Method, path, and the status with a valid key."""
SCHEMES = (b"Basic", b"Token", b"Digest", b"Bearer:", b"Bearer\t", b"Bearer,", b"", b"\xff", b"B" * 9_000)


def wrong_keys(key: bytes) -> st.SearchStrategy[bytes]:
    """Random bytes, and damaged valid keys."""
    place = st.integers(0, len(key) - 1)
    mangled = st.one_of(
        st.tuples(place, st.integers(0, 255)).map(lambda at: key[: at[0]] + bytes([at[1]]) + key[at[0] + 1 :]),
        place.map(lambda at: key[:at]),
        place.map(lambda at: key[at + 1 :]),
        place.map(lambda at: key[:at] + b" " + key[at:]),
        st.binary(min_size=1, max_size=8).map(key.__add__),
        st.binary(min_size=1, max_size=8).map(lambda before: before + key),
        st.sampled_from(
            (key.upper(), key.lower(), key.swapcase(), key[::-1], key * 2, b'"%b"' % key, key + b"," + key)
        ),
    )
    whole = st.sampled_from((b"", b"null", b"undefined", b"*", b"bertqa_", b"' OR 1=1 --", b"../keys", "ключ".encode()))
    huge = st.tuples(st.sampled_from((b"x", b"\xff", b" ", key)), st.integers(1_000, 30_000)).map(
        lambda pair: pair[0] * pair[1] if len(pair[0]) == 1 else pair[0] * (pair[1] // 40)
    )
    found = (mangled | st.binary(max_size=80) | whole | huge).map(_header)
    return found.filter(lambda value: value.decode("latin-1").strip() != key.decode())


@st.composite
def keyed(draw: st.DrawFn, known: Mapping[bytes, bool]) -> Stranger:
    """Requests to a service that knows these keys; keys that are False allow only one request."""
    key = draw(st.sampled_from(sorted(known)))
    right = draw(st.integers(0, 3)) == 0
    shown = key if right else draw(wrong_keys(key))
    if draw(st.booleans()):
        headers = [(b"x-api-key", shown)]
    else:
        scheme = draw(st.sampled_from((b"Bearer", b"bearer")) if right else st.sampled_from((b"Bearer", *SCHEMES)))
        headers = [(b"authorization", scheme + b" " * draw(st.integers(1, 3)) + shown)]
    match draw(st.integers(0, 5)):
        case 0 | 1:  # twice, even if equal
            name, value = headers[0]
            headers.insert(draw(st.integers(0, 1)), (name, draw(st.sampled_from((value, key, b"Bearer " + key, b"")))))
            right = False
        case 2:  # with a second key: of the two headers, x-api-key counts
            other = draw(wrong_keys(key))
            if headers[0][0] == b"authorization":
                headers.append((b"x-api-key", other))
                right = right and not other
            elif shown:
                headers.append((b"authorization", b"Bearer " + other))
        case 3 if not right:
            headers = []
    method, target, status = draw(st.sampled_from(GUARDED_TARGETS if draw(st.integers(0, 5)) else OPEN_TARGETS))
    statuses = {status} if right or (method, target, status) in OPEN_TARGETS else {401}
    return Stranger(
        method, target, tuple(headers), frozenset(statuses | ({429} if right and not known[key] else set()))
    )


@contextlib.contextmanager
def _logged() -> Iterator[list[str]]:
    """Capture all log lines during a block, at any level, with every field that may contain text."""
    lines: list[str] = []
    formatter = JsonFormatter(texts=True)
    root = logging.getLogger()

    class Collecting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(formatter.format(record))

    handler, level = Collecting(), root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        yield lines
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


def keys(count: int, seed: int) -> Row:
    """Check that only valid keys get access, and that no part of a key is in a reply or the log."""
    row = Row(fault="API keys, generated")
    with tempfile.TemporaryDirectory() as directory, _logged() as lines:
        path = Path(directory) / "keys"
        known = {new_key(path, "free", None, None).encode(): True, new_key(path, "limited", 0.01, 1).encode(): False}
        secrets = [
            key.decode().casefold()[at : at + SECRET_CHARS]
            for key in known
            for at in range(len(key) - SECRET_CHARS + 1)
        ]
        with Service(application(api_keys_file=str(path), metrics="key", docs="key")).running() as service:

            def examine(asked: Stranger) -> None:
                lines.clear()
                reply = _ask(service, row, asked, GUARDED)
                told = "\n".join((*lines, str(reply.headers), reply.body.decode())).casefold()
                assert not [part for part in secrets if part in told], (asked, told)
                assert reply.status != 401 or reply.json()["error"] in UNAUTHORIZED, reply.body

            return explore(row, keyed(known), examine, count, seed)


def guarded(count: int, seed: int) -> Row:
    """Check OpenAPI of a service that requires a key, with and without one."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "keys"
        return described(count, seed, key=new_key(path, "free", None, None), api_keys_file=str(path))


# ---- pages of other origins ----------------------------------------------------------------------------------------

ORIGINS = ("https://example.com", "http://localhost:3000", "https://[::1]:8443")
"""Origins whose pages may ask."""
METHODS = "GET, POST"
HEADERS = {"accept", "accept-language", "authorization", "content-language", "content-type", "x-api-key"}
HEADERS |= {"x-request-id", "x-timeout-ms"}
NEAR_ORIGINS = (
    *("*", "null", "", " ", "https://", "https://*", "https://*.example.com", "file://", "//example.com"),
    *("http://example.com", "https://EXAMPLE.com", "https://example.com/", "https://example.com:443"),
    *("https://example.com.evil.org", "https://evil.org/https://example.com", "https://user@example.com"),
    *("https://sub.example.com", "https://notexample.com", "https://example.com https://evil.org"),
    *("https://example.com, https://example.com", "https://example.com%00.evil.org", "https://example.com\t"),
    *("https://exämple.com", "https://ехаmple.com", "https://[::1]", "https://" + "x" * 20_000),
)
ANY_ORIGIN = st.one_of(
    st.sampled_from(ORIGINS).map(str.encode),
    st.sampled_from(NEAR_ORIGINS).map(str.encode),
    st.tuples(st.binary(max_size=3), st.sampled_from(ORIGINS).map(str.encode), st.binary(max_size=3)).map(b"".join),
    st.binary(max_size=40),
).map(_header)
ANY_METHOD = st.sampled_from(
    ("GET", "POST", "OPTIONS", "HEAD", "PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "QUERY", "get", "*", "", "X" * 300)
)
ANY_NAME = st.sampled_from((*sorted(HEADERS), "*", "cookie", "X-API-Key", "x-evil", "", "é", "x" * 5_000))


@st.composite
def cross_origin_requests(draw: st.DrawFn) -> Stranger:
    """Requests and preflights, as browsers send them and as no browser does."""
    origins = draw(st.one_of(st.lists(ANY_ORIGIN, min_size=1, max_size=1), st.lists(ANY_ORIGIN, max_size=2)))
    headers = [(b"origin", origin) for origin in origins]
    method = draw(ANY_METHOD.filter(bool))
    if draw(st.booleans()):
        method = "OPTIONS"
        headers.append((b"access-control-request-method", draw(ANY_METHOD.map(str.encode) | HEADER_BYTES)))
        for names in draw(st.lists(st.lists(ANY_NAME, max_size=3), max_size=2)):
            headers.append((b"access-control-request-headers", ", ".join(names).encode("latin-1")))
        if draw(st.integers(0, 4)) == 0:
            headers.append((b"access-control-request-private-network", b"true"))
    if draw(st.integers(0, 4)) == 0:
        name = draw(st.sampled_from((b"cookie", b"referer", b"host", b"sec-fetch-site", b"authorization")))
        headers.append((name, draw(HEADER_BYTES)))
    targets = ("/", "/v1/answer", "/v1/answers", "/models/x", "/info", "/health/live", "/static/page.js", "/no/such")
    statuses = frozenset({200, 400, 404, 405})
    return Stranger(method, draw(st.sampled_from(targets)), tuple(headers), statuses)


def cross_origin(count: int, seed: int) -> Row:
    """Check that only pages of the allowed origins may ask, only in the intended ways, and never all origins."""
    row = Row(fault="origins and preflights, generated")
    with Service(application(cors_origins=", ".join(ORIGINS))).running() as service:

        def examine(asked: Stranger) -> None:
            reply = _ask(service, row, asked, CROSS_ORIGIN)
            origins = [value.decode("latin-1") for name, value in asked.headers if name == b"origin"]
            said = {name: value for name, value in reply.headers.items() if name.startswith("access-control-")}
            allowed = said.pop("access-control-allow-origin", None)
            assert allowed is None or allowed in {*ORIGINS} & {*origins[:1]}, (asked, allowed)
            named = len(origins) == 1 and origins[0] in ORIGINS
            assert allowed or not named or reply.status == 400, asked
            assert said.pop("access-control-allow-methods", METHODS) == METHODS
            names = said.pop("access-control-allow-headers", ", ".join(HEADERS))
            assert set(names.lower().split(", ")) == HEADERS
            assert said.keys() <= {"access-control-max-age", "access-control-expose-headers"}, said
            assert "*" not in "".join(said.values())
            assert "Origin" in reply.headers["vary"]

        return explore(row, cross_origin_requests(), examine, count, seed)


TARGETS: Targets = {
    "keys": (keys, 0.05),
    "guarded_openapi": (guarded, 0.001),
    "cross_origin": (cross_origin, 0.05),
}


def who_may_ask(size: Size) -> Iterator[Row]:
    """Return a row for each target."""
    yield from generate(TARGETS, size)
