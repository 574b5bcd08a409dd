"""Test the commands' HTTP client against servers that are busy, gone or not bertqa."""

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from bertqa.backoff import pauses, retry_after_s, spread
from bertqa.client import AnswerRequest, Client, Refused, ServerFailed, Unreachable
from service.triton.errors import EngineOverloaded
from tests.support.toy_model import FakeEngine

ASKED: AnswerRequest = {"question": "who?", "context": "It was made by «Uber»."}
REPLY = {"answers": [], "has_answer": False, "null_score": 1.0, "model": "m"}
Scripted = tuple[int, dict[str, str], bytes]


@contextmanager
def scripted(*replies: Scripted) -> Iterator[tuple[str, list[float]]]:
    """A server that gives these replies one after the other, the last one for ever; with the times of the requests."""
    times: list[float] = []
    script = itertools.chain(replies, itertools.repeat(replies[-1]))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            times.append(time.monotonic())
            self.rfile.read(int(self.headers["content-length"]))
            status, headers, body = next(script)
            self.send_response(status)
            for name, value in (headers | {"content-length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", times
        finally:
            server.shutdown()
            thread.join()


def refusal(status: int, **headers: str) -> Scripted:
    body = json.dumps({"error": "not now", "error_type": "engine_overloaded", "field": None}).encode()
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, body


OK: Scripted = (200, {}, json.dumps(REPLY).encode())


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_service_is_asked_again_after_the_time_that_it_names(status: int) -> None:
    said: list[str] = []
    with (
        scripted(refusal(status, retry_after="1"), refusal(status, retry_after="1"), OK) as (url, times),
        Client(url, report=said.append) as client,
    ):
        assert client.answer(ASKED) == REPLY
    assert len(times) == 3
    assert all(later - earlier >= 1.0 for earlier, later in itertools.pairwise(times))
    assert said == [f"not now (status {status}). Trying again for up to 60 s."], "once, not every time"
    assert client.retries == 2
    assert 2.0 <= client.waited_s <= 3.0


def test_waits_end_at_the_clients_own_limit() -> None:
    began = time.monotonic()
    with (
        scripted(refusal(503, retry_after="30")) as (url, times),
        Client(url, timeout_s=2) as client,
        pytest.raises(ServerFailed, match=r"not now \(status 503\)\. Gave up after 0 s"),
    ):
        client.answer(ASKED)
    assert len(times) == 1, "a wait that is longer than the time left is not begun"
    assert time.monotonic() - began < 2


def test_a_service_that_is_not_there_is_tried_until_the_limit() -> None:
    said: list[str] = []
    with (
        Client("http://127.0.0.1:9", timeout_s=0.5, report=said.append) as client,
        pytest.raises(Unreachable, match=r"is `bertqa serve` running\? Gave up after 0 s"),
    ):
        client.answer(ASKED)
    assert client.retries >= 1
    assert len(said) == 1


@pytest.mark.parametrize(
    ("reply", "kind", "words"),
    [
        (refusal(422), Refused, r"not now \(status 422\)"),
        (refusal(500), ServerFailed, r"not now \(status 500\)"),
        ((502, {}, b"<h1>Bad gateway</h1>"), ServerFailed, "status 502, not a reply of this service"),
        ((200, {}, b"<h1>Welcome</h1>"), ServerFailed, "status 200, not a JSON object"),
    ],
)
def test_what_does_not_pass_is_not_tried_again(reply: Scripted, kind: type[Exception], words: str) -> None:
    with scripted(reply) as (url, times), Client(url) as client, pytest.raises(kind, match=words):
        client.answer(ASKED)
    assert len(times) == 1


def test_threads_share_a_client_of_a_real_service_that_turns_busy_and_back(url: str, engine: FakeEngine) -> None:
    engine.failure = EngineOverloaded("too many questions")
    threading.Timer(0.5, lambda: setattr(engine, "failure", None)).start()
    said: list[str] = []
    with Client(url, report=said.append) as client, ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(client.answer, [ASKED] * 8))
    assert [reply["answers"][0]["text"] for reply in replies] == ["Uber"] * 8
    assert client.retries >= 4
    assert len(said) == 1


def test_a_url_or_key_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for url in ("127.0.0.1:8000", "ftp://example.com", "http://"):
        with pytest.raises(ValueError, match=f"--url {url}: "):
            Client(url)
    monkeypatch.setenv("BERTQA_API_KEY", "schlüssel")
    with pytest.raises(ValueError, match="BERTQA_API_KEY: "):
        Client()


def test_retry_after_is_read_as_seconds_or_as_a_date() -> None:
    soon = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=20), usegmt=True)
    assert 18 < (retry_after_s(soon) or 0) <= 20
    assert [retry_after_s(each) for each in ("3", "0", None, "soon", "-1")] == [3.0, 0.0, None, None, None]


@pytest.mark.parametrize(("make", "least", "most"), [(lambda: spread(2.0), 2.0, 3.0)])
def test_waits_differ_and_are_never_shorter_than_asked(make: Callable[[], float], least: float, most: float) -> None:
    waits = [make() for _ in range(100)]
    assert least <= min(waits) < max(waits) <= most


def test_pauses_grow_up_to_a_limit() -> None:
    found = list(itertools.islice(pauses(), 12))
    assert 0.05 <= found[0] <= 0.15
    assert all(1.0 <= pause <= 3.0 for pause in found[6:])
