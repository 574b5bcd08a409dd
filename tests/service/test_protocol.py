"""Replies leave in one piece, and clients that are slow or hostile take nothing from the others.

The latter against a process of its own, over raw sockets; each test prints how many connections and open files the
process has before, meanwhile and after.
"""

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
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
from service.protocol import MAX_HEAD_BYTES, BoundedProtocol
from service.settings import Settings
from tests.support.asking import ASKED, problem
from tests.support.paths import ROOT
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


@contextlib.contextmanager
def server_process() -> Iterator[ServerProcess]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        command = [sys.executable, "-m", "uvicorn", f"{__name__}:toy_app", "--factory", "--loop=uvloop"]
        command += ["--http=service.protocol:BoundedProtocol", "--ws=none", "--log-level=error"]
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
        (b"GET / HTTP/1.1\r\nx: " + b"y" * MAX_HEAD_BYTES + b"\r\n\r\n", 431, "head_too_large"),
        (b"GET /" + b"y" * MAX_HEAD_BYTES + b" HTTP/1.1\r\n\r\n", 431, "head_too_large"),
        (b"GET / HTTP/1.1\r\n" + b"a:b\r\n" * 7000 + b"\r\n", 431, "head_too_large"),
    ],
    ids=["tls", "no colon", "two lengths", "chunk", "header", "address", "headers"],
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
    with server.connect() as connection:
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            for _ in range(50):
                connection.sendall(b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n" * 1000)
        assert read_all(connection).count(b"HTTP/1.1 ") < 100


def test_a_connection_is_closed_when_it_is_no_longer_used(server: ServerProcess) -> None:
    with server.connect() as connection:
        connection.sendall(b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 200 ")  # up to its end, which uvicorn's keep-alive sets
    assert problem(server.client.get("/no/such/path"), 404, "not_found")
