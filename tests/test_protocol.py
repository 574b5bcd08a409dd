"""Replies leave in one piece."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from service.protocol import WholeReplies

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
        protocol = WholeReplies(config, ServerState(), {})
        protocol.connection_made(transport)
        protocol.data_received(request_bytes)
        await asyncio.sleep(0.1)
        assert transport.closed is closed
        protocol.connection_lost(None)
        return transport

    transport = asyncio.run(scenario())
    assert [write.rpartition(b"\r\n")[2] for write in transport.writes] == pieces
