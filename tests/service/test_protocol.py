"""Test that replies are sent in one piece, and that slow or hostile clients do not affect others.

Hostile clients use raw sockets against a separate process; each test prints the process's numbers of connections and
open files before, meanwhile and after.
"""

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from uvicorn.server import ServerState

from service.app import create_app
from service.runtime.http_protocol import MAX_BODIES_BYTES, MAX_HEAD_BYTES, MAX_PIPELINED, BoundedProtocol
from service.runtime.transport import MAX_UNREAD_BYTES
from service.settings import Settings
from tests.support.asking import ASKED, problem
from tests.support.paths import ROOT
from tests.support.servers import serving
from tests.support.toy_model import FakeEngine, toy_bundle

Send = Callable[[dict[str, Any]], Awaitable[None]]
GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


class Recorder(asyncio.Transport):
    """A connection that keeps what is written to it."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)})
        self.writes: list[bytes] = []
        self.closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.closed
        self.writes.append(bytes(data))

    def is_closing(self) -> bool:
        return self.closed

    def get_write_buffer_size(self) -> int:
        return 0

    def close(self) -> None:
        self.closed = True

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


async def app(scope: dict[str, Any], receive: object, send: Send) -> None:
    headers = [(b"content-length", b"8")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"four", "more_body": True})
    if scope["path"] == "/slow":
        await asyncio.sleep(0.01)
    await send({"type": "http.response.body", "body": b"four"})


@pytest.mark.parametrize(
    ("request_bytes", "pieces", "closed"),
    [
        (GET, [b"fourfour"], False),
        (GET.replace(b"host", b"connection: close\r\nhost"), [b"fourfour"], True),
        (GET.replace(b"/", b"/slow", 1), [b"four", b"four"], False),  # what waits, waits for no other piece
        (GET + GET, [b"fourfour", b"fourfour"], False),
    ],
    ids=["kept", "closed", "slow", "two"],
)
def test_what_is_written_at_once_leaves_at_once(request_bytes: bytes, pieces: list[bytes], closed: bool) -> None:
    async def scenario() -> Recorder:
        config = uvicorn.Config(app, log_config=None, ws="none", lifespan="off")
        config.load()
        transport = Recorder()
        protocol = BoundedProtocol(config, ServerState(), {})
        protocol.connection_made(transport)
        protocol.data_received(request_bytes)
        await asyncio.sleep(0.1)
        assert transport.closed is closed
        protocol.connection_lost(None)
        return transport

    transport = asyncio.run(scenario())
    assert [write.rpartition(b"\r\n")[2] for write in transport.writes] == pieces


def test_all_requests_of_a_connection_end_with_it() -> None:
    ended, begun = [], []

    async def waiting(scope: dict[str, Any], receive: Callable[[], Awaitable[dict[str, Any]]], send: Send) -> None:
        begun.append(scope["path"])
        while (await receive())["type"] != "http.disconnect":
            pass
        ended.append(scope["path"])

    async def scenario() -> None:
        config = uvicorn.Config(waiting, log_config=None, ws="none", lifespan="off")
        config.load()
        protocol = BoundedProtocol(config, ServerState(), {})
        protocol.connection_made(Recorder())
        protocol.data_received(GET.replace(b"/", b"/first", 1) + GET)
        await asyncio.sleep(0.05)
        protocol.connection_lost(None)
        await asyncio.sleep(0.05)

    asyncio.run(scenario())
    assert begun == ended == ["/first"]


def test_a_reply_leaves_before_it_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = toy_bundle()
    app = create_app(Settings(), engine=FakeEngine(bundle.manifest.identity), bundle=bundle)
    taken, in_time = threading.Event(), []

    def count(route: str, *_: object) -> None:
        if route == "/info":
            in_time.append(taken.wait(5))

    with (
        serving(app, http=BoundedProtocol, loop="uvloop") as url,
        httpx.Client(base_url=url, trust_env=False, timeout=30) as client,
    ):
        client.get("/health/live")
        monkeypatch.setattr(app.state.services.metrics, "requested", count)
        assert client.get("/info").status_code == 200
        taken.set()
    assert in_time == [True]


# Slow and hostile clients

ARRIVAL_S, MAX_CONNECTIONS, MAX_BODY = 1.5, 40, 100_000
HEAD = b"POST /v1/answer HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


def toy_app() -> FastAPI:
    """What the server process runs."""
    bundle = toy_bundle()
    settings = Settings(arrival_s=ARRIVAL_S, max_connections=MAX_CONNECTIONS, max_body_bytes=MAX_BODY)
    return create_app(settings, engine=FakeEngine(bundle.manifest.identity), bundle=bundle)


class ServerProcess:
    """A uvicorn of its own, as `bertqa serve` starts it."""

    def __init__(self, process: "subprocess.Popen[bytes]", port: int) -> None:
        self.process, self.port = process, port
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def open_files(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def peak_memory(self) -> int:
        """Bytes of resident memory at most so far."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024

    def connections(self) -> int:
        found = next(
            line for line in self.client.get("/metrics").text.splitlines() if line[:18] == "bertqa_connections"
        )
        return round(float(found.split()[1])) - 1  # this client's own

    def answers(self) -> None:
        """See that it answers a question as always."""
        for _ in range(3):
            answered = self.client.post("/v1/answer", json=ASKED)
            assert answered.json()["answers"][0]["text"] == "Uber"


def roomy_app() -> FastAPI:
    """The same with default settings."""
    bundle = toy_bundle()
    return create_app(Settings(), engine=FakeEngine(bundle.manifest.identity), bundle=bundle)


def large_app() -> Callable[..., Awaitable[None]]:
    """Replies of 16 MiB to all but what `ServerProcess` asks."""
    toy = roomy_app()

    async def answer(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" or scope["path"] != "/large":
            await toy(scope, receive, send)
            return
        headers = [(b"content-length", b"%d" % LARGE)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": os.urandom(1) * LARGE})

    return answer


LARGE = 16 << 20


@contextlib.contextmanager
def server_process(factory: str = "toy_app") -> Iterator[ServerProcess]:
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        command = [sys.executable, "-m", "uvicorn", f"{__name__}:{factory}", "--factory", "--loop=uvloop"]
        command += ["--http=service.runtime.http_protocol:BoundedProtocol", "--ws=none", "--log-level=error"]
        process = subprocess.Popen(
            [*command, f"--fd={listener.fileno()}"],
            pass_fds=[listener.fileno()],
            cwd=ROOT,
        )
        server = ServerProcess(process, listener.getsockname()[1])
    try:
        with server.client:
            server.answers()
            yield server
    finally:
        process.terminate()
        assert process.wait(30) in (0, -15)


@pytest.fixture(scope="module")
def shared_server() -> Iterator[ServerProcess]:
    with server_process() as started:
        yield started


@pytest.fixture
def server(shared_server: ServerProcess) -> Iterator[ServerProcess]:
    """The server, which must be afterwards as it was before."""
    shared_server.answers()
    files = shared_server.open_files()
    print(f"before: {shared_server.connections()} connections, {files} open files")
    yield shared_server
    shared_server.answers()
    end = time.monotonic() + 30
    while (left := (shared_server.connections(), shared_server.open_files())) != (0, files):
        assert time.monotonic() < end, left
        time.sleep(0.1)
    print(f"after: {left[0]} connections, {left[1]} open files")


def read_all(connection: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        while piece := connection.recv(65536):
            received += piece
    return received


def refusal(received: bytes, status: int, error_type: str) -> None:
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), received
    assert b"connection: close" in head.lower()
    assert json.loads(body)["error_type"] == error_type


def test_slow_heads_and_connections_that_send_nothing_are_ended(server: ServerProcess) -> None:
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(server.connect()) for _ in range(15)]
        silent = [stack.enter_context(server.connect()) for _ in range(15)]
        ended = []
        for number in range(20):  # drip by drip, well over the limit
            for connection in list(slow):
                try:
                    connection.sendall(b"POST / HTTP/1.1\r\n" if number == 0 else b"x-%d: y\r\n" % number)
                except (ConnectionResetError, BrokenPipeError):
                    slow.remove(connection)
                    ended.append(connection)
            if number == 2:
                server.answers()
                print(f"meanwhile: {server.connections()} connections, {server.open_files()} open files")
            time.sleep(0.15)
        assert len(ended) == 15
        assert [read_all(connection) for connection in silent] == [b""] * 15


def test_a_slow_head_is_told_so(server: ServerProcess) -> None:
    with server.connect() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n")
        refusal(read_all(connection), 408, "slow_request")


@pytest.mark.parametrize("chunked", [False, True])
def test_slow_bodies_are_told_so(server: ServerProcess, chunked: bool) -> None:
    length = b"transfer-encoding: chunked\r\n\r\n5\r\n" if chunked else b"content-length: 5000\r\n\r\n"
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(server.connect()) for _ in range(20)]
        for connection in slow:
            connection.sendall(HEAD + length + b'{"que')
        server.answers()
        print(f"meanwhile: {server.connections()} connections, {server.open_files()} open files")
        for connection in slow:
            refusal(read_all(connection), 408, "slow_request")
    assert 'bertqa_errors_total{error_type="slow_request"}' in server.client.get("/metrics").text


def test_idle_connections_make_room_for_others(server: ServerProcess) -> None:
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(server.connect()) for _ in range(3 * MAX_CONNECTIONS)]
        for connection in idle[::2]:
            with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                connection.sendall(b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n")
        with httpx.Client(base_url=server.client.base_url, trust_env=False, timeout=30) as newcomer:
            assert newcomer.post("/v1/answer", json=ASKED).status_code == 200
            found = server.connections()
        print(f"meanwhile: {found} connections, {server.open_files()} open files")
        assert found <= MAX_CONNECTIONS


def test_when_all_are_busy_the_next_connection_is_refused() -> None:
    with server_process() as server, contextlib.ExitStack() as stack:
        server.client.close()
        busy = [stack.enter_context(server.connect()) for _ in range(MAX_CONNECTIONS)]
        for connection in busy:
            connection.sendall(HEAD + b"expect: 100-continue\r\ncontent-length: 5000\r\n\r\n")
            assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"  # its application waits for the body
        refusal(read_all(stack.enter_context(server.connect())), 503, "too_many_connections")
        server.client = stack.enter_context(httpx.Client(base_url=server.client.base_url, trust_env=False))
        for connection in busy:
            refusal(read_all(connection), 408, "slow_request")
        server.answers()


def test_huge_bodies_are_refused_whatever_they_announce(server: ServerProcess) -> None:
    with server.connect() as connection:
        connection.sendall(HEAD + b"content-length: 10000000000\r\n\r\n")
        announced = connection.recv(65536)
        assert announced.startswith(b"HTTP/1.1 413 ")
        end = time.monotonic() + 30
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            while time.monotonic() < end:  # it is not stored, and not taken for ever
                connection.sendall(b"x" * 65536)
                time.sleep(0.05)
        assert time.monotonic() < end
    with server.connect() as connection:
        connection.sendall(HEAD + b"transfer-encoding: chunked\r\n\r\n")
        for _ in range(20):
            connection.sendall(b"2710\r\n" + b"x" * 10_000 + b"\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_aborted_uploads_leave_nothing_behind(server: ServerProcess) -> None:
    for _ in range(60):
        with server.connect() as connection:
            connection.sendall(HEAD + b"content-length: 5000\r\n\r\n{")
    server.answers()


def test_a_reply_that_nobody_takes_is_not_kept(server: ServerProcess) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(10):
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", server.port))
            with contextlib.suppress(ConnectionResetError, BrokenPipeError, TimeoutError):
                for _ in range(8):
                    connection.sendall(b"GET /static/swagger/swagger-ui-bundle.js HTTP/1.1\r\nhost: x\r\n\r\n")
        server.answers()
        print(f"meanwhile: {server.connections()} connections, {server.open_files()} open files")
        end = time.monotonic() + 30
        while server.connections():  # while the clients still hold theirs
            assert time.monotonic() < end
            time.sleep(0.1)


@pytest.mark.parametrize(
    ("sent", "status", "error_type"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "malformed_http"),  # TLS
        (b"GET / HTTP/1.1\r\nno colon\r\n\r\n", 400, "malformed_http"),
        (HEAD + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400, "malformed_http"),
        (HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n", 400, "malformed_http"),
        (HEAD + b"content-length: 2\r\ncontent-length: 2\r\n\r\n{}", 400, "malformed_http"),
        (HEAD + b"transfer-encoding: gzip, chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 400, "malformed_http"),
        (HEAD + b"transfer-encoding: chunked, chunked\r\n\r\n0\r\n\r\n", 400, "malformed_http"),
        (HEAD + b"transfer-encoding: chunked\r\n" * 2 + b"\r\n0\r\n\r\n", 400, "malformed_http"),
        (HEAD + b"transfer-encoding: identity\r\n\r\n", 400, "malformed_http"),
        (
            HEAD.replace(b"1.1", b"1.0") + b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
            400,
            "malformed_http",
        ),
        (HEAD + b"host: x\r\ncontent-length: 2\r\n\r\n{}", 400, "malformed_http"),
        (b"GET /health/live HTTP/1.1\r\n\r\n", 400, "malformed_http"),
        (b"GET / HTTP/1.1\r\nx: " + b"y" * MAX_HEAD_BYTES + b"\r\n\r\n", 431, "head_too_large"),
        (b"GET /" + b"y" * MAX_HEAD_BYTES + b" HTTP/1.1\r\n\r\n", 431, "head_too_large"),
        (b"GET / HTTP/1.1\r\n" + b"a:b\r\n" * 7000 + b"\r\n", 431, "head_too_large"),
    ],
    ids=[
        "tls",
        "no colon",
        "length and chunks",
        "chunk",
        "two lengths",
        "gzip",
        "chunked twice",
        "two encodings",
        "identity",
        "chunks in 1.0",
        "two hosts",
        "no host",
        "header",
        "address",
        "headers",
    ],
)
def test_what_is_not_http_is_refused(server: ServerProcess, sent: bytes, status: int, error_type: str) -> None:
    with server.connect() as connection:
        connection.sendall(sent)
        refusal(read_all(connection), status, error_type)


def test_pipelined_requests_are_answered_in_order_and_bounded(server: ServerProcess) -> None:
    paths = [b"/health/live", b"/info", b"/no/such/path", b"/health/live"]
    with server.connect() as connection:
        connection.sendall(b"".join(b"GET %b HTTP/1.1\r\nhost: x\r\n\r\n" % path for path in paths))
        received = b""
        while received.count(b"HTTP/1.1 ") < 4 or not received.endswith(b"}"):
            received += connection.recv(65536)
        assert [part[:3] for part in received.split(b"HTTP/1.1 ")[1:]] == [b"200", b"200", b"404", b"200"]


@pytest.mark.parametrize("times", [1, 50])
def test_one_request_too_many_is_refused_after_those_before_it_are_answered(server: ServerProcess, times: int) -> None:
    with server.connect() as connection:
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            for _ in range(times):  # all are sent, whether anybody reads them or not
                connection.sendall(b"GET /info HTTP/1.1\r\nhost: x\r\n\r\n" * 1000)
        replies = read_all(connection).split(b"HTTP/1.1 ")[1:]
    assert [reply[:3] for reply in replies] == [b"200"] * (MAX_PIPELINED + 1) + [b"400"]
    refusal(b"HTTP/1.1 " + replies[-1], 400, "malformed_http")


@pytest.mark.parametrize(
    ("broken", "last"),
    [
        (b"no request\r\n\r\n", b"400"),
        (HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nx: " + b"y" * MAX_HEAD_BYTES + b"\r\n\r\n", b"431"),
    ],
    ids=["head", "body", "large"],
)
def test_what_is_not_http_is_refused_in_its_turn(server: ServerProcess, broken: bytes, last: bytes) -> None:
    with server.connect() as connection:
        connection.sendall(b"GET /info HTTP/1.1\r\nhost: x\r\n\r\n" * 3 + broken + b"more" * 10_000)
        replies = read_all(connection).split(b"HTTP/1.1 ")[1:]
    assert [reply[:3] for reply in replies] == [b"200", b"200", b"200", last]


UPGRADES = {
    "h2c": b"connection: Upgrade, HTTP2-Settings\r\nhttp2-settings: AAMAAABkAAQCAAAAAAIAAAAA\r\nupgrade: h2c\r\n",
    "websocket": b"connection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n",
}


@pytest.mark.parametrize("pause_s", [0.0, 0.1])
@pytest.mark.parametrize("framing", ["length", "chunked", "drip"])
@pytest.mark.parametrize("protocol", UPGRADES)
def test_an_upgrade_is_ignored_and_the_body_is_not(
    server: ServerProcess, protocol: str, framing: str, pause_s: float
) -> None:
    body = json.dumps(ASKED).encode()
    head = HEAD + UPGRADES[protocol]
    if framing == "length":
        pieces = [head + b"content-length: %d\r\n\r\n" % len(body), body]
    else:
        size = 7 if framing == "drip" else len(body)
        chunks = [body[at : at + size] for at in range(0, len(body), size)]
        pieces = [head + b"transfer-encoding: chunked\r\n\r\n", *(b"%x\r\n%b\r\n" % (len(c), c) for c in chunks)]
        pieces.append(b"0\r\nx-trailer: y\r\n\r\n")
    pieces.append(b"GET /health/live HTTP/1.1\r\nhost: x\r\n" + UPGRADES[protocol] + b"\r\n")
    pieces.append(b"GET /info HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    with server.connect() as connection:
        if pause_s:
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause_s if framing == "length" else 0.01)
        else:
            connection.sendall(b"".join(pieces))
        replies = read_all(connection).split(b"HTTP/1.1 ")[1:]
    assert [reply[:3] for reply in replies] == [b"200"] * 3
    assert json.loads(replies[0].partition(b"\r\n\r\n")[2])["answers"][0]["text"] == "Uber"


def test_curl_asks_with_http2(server: ServerProcess) -> None:
    command = ["curl", "--silent", "--show-error", "--http2", "--json", json.dumps(ASKED), "--max-time", "20"]
    url = f"http://127.0.0.1:{server.port}/v1/answer"
    done = subprocess.run([*command, url, url], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"text":"Uber"') == 2


def test_replies_that_nobody_reads_are_bounded_over_all_connections() -> None:
    with server_process("large_app") as server, contextlib.ExitStack() as stack:
        before = server.peak_memory()
        silent = [stack.enter_context(server.connect()) for _ in range(14)]
        for connection in silent:
            connection.sendall(b"GET /large HTTP/1.1\r\nhost: x\r\n\r\n" * 4)
            time.sleep(0.1)
        with server.connect() as reader:  # who reads, gets all
            reader.sendall(b"GET /large HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            assert len(read_all(reader).partition(b"\r\n\r\n")[2]) == LARGE
        server.answers()
        grown = server.peak_memory() - before
        print(f"memory of {len(silent)} replies of {LARGE:,} bytes that nobody reads: +{grown:,} bytes")
        assert grown < MAX_UNREAD_BYTES + 3 * LARGE + (1 << 20)  # the next one, two copies of it, and odds and ends
        assert server.connections() >= 2  # those that fit are kept


def test_bodies_that_arrive_are_bounded_over_all_connections() -> None:
    size = 2 << 20
    with server_process("roomy_app") as server, contextlib.ExitStack() as stack:
        before = server.peak_memory()
        slow = [stack.enter_context(server.connect()) for _ in range(60)]
        for connection in slow:
            with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                connection.sendall(HEAD + b"content-length: %d\r\n\r\n" % size + b" " * (size - 10))
        server.answers()  # who sends a little is not kept out
        grown = server.peak_memory() - before
        print(f"memory of {len(slow)} bodies of {size:,} bytes that do not end: +{grown:,} bytes")
        assert grown < MAX_BODIES_BYTES + (16 << 20)
        kept = MAX_BODIES_BYTES // size
        for connection in slow[: len(slow) - kept - 1]:
            refused = read_all(connection)
            refusal(refused, 503, "bodies_overloaded")
            assert b"retry-after: 1\r\n" in refused
        for connection in slow[-kept:]:  # the last ones may end
            connection.sendall(b"{}" + b" " * 8)
            assert connection.recv(65536).startswith(b"HTTP/1.1 422 ")


def test_a_connection_is_closed_when_it_is_no_longer_used(server: ServerProcess) -> None:
    with server.connect() as connection:
        connection.sendall(b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 200 ")  # up to its end, which uvicorn's keep-alive sets
    assert problem(server.client.get("/no/such/path"), 404, "not_found")
