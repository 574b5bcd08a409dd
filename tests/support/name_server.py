"""A DNS server for tests."""

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from typing import Any


class Names(asyncio.DatagramProtocol):
    """A DNS server (RFC 1035) that answers every query for IPv4 addresses with its current list, and others with
    nothing."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = addresses

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, query: bytes, client: Any) -> None:
        question = query[12 : query.index(0, 12) + 5]  # name, type, class
        found = self.addresses if question[-4:-2] == b"\0\1" else ()
        head = query[:2] + struct.pack("!5H", 0x8580, 1, len(found), 0, 0)
        records = [struct.pack("!3HIH", 0xC00C, 1, 1, 0, 4) + socket.inet_aton(address) for address in found]
        self.transport.sendto(head + question + b"".join(records), client)

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        """Yield the URL, without a port, of a name that only this server knows."""
        transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(lambda: self, ("127.0.0.1", 0))
        try:
            yield "dns://{}:{}/triton.example".format(*transport.get_extra_info("sockname"))
        finally:
            transport.close()
