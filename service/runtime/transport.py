"""The transport under uvicorn's protocol: joins what is written, counts what clients do not take, closes cleanly."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

log = logging.getLogger("bertqa.service")

MAX_UNREAD_BYTES = 64 * 1024 * 1024
"""Bytes of replies that a process keeps for clients that have not taken them yet."""
LINGER_S = 1.0
"""Seconds that a connection stays open after its last reply if the client is still sending."""


class Unread:
    """Counts the bytes of replies that the clients of a process have not taken yet, and bounds them."""

    def __init__(self, limit: int = MAX_UNREAD_BYTES) -> None:
        self.bytes = 0
        self._limit = limit
        self._sizes: dict[JoiningTransport, int] = {}  # whose client is behind for longest comes first

    def update(self, transport: "JoiningTransport", size: int) -> None:
        """Note how many bytes wait in a transport now."""
        self.bytes += size - self._sizes.get(transport, 0)
        if size:
            self._sizes[transport] = size
        else:
            self._sizes.pop(transport, None)

    def make_room(self) -> None:
        """Abort the connections whose clients are behind for longest, until the rest fits."""
        if self.bytes <= self._limit:
            return
        for each in list(self._sizes):  # what was taken since each of them wrote last
            self.update(each, each.get_write_buffer_size())
        for each in list(self._sizes):
            if self.bytes <= self._limit:
                return
            log.warning("a client was cut off: over %d bytes of replies were not read in time", self._limit)
            each.abort()
            self.update(each, 0)


class JoiningTransport:
    """A transport that joins what is written in one turn of the event loop; all else goes to the one below."""

    def __init__(
        self,
        transport: asyncio.Transport,
        loop: asyncio.AbstractEventLoop,
        unread: Unread,
        *,
        patience_s: float,
        is_receiving: Callable[[], bool],
    ) -> None:
        """Wrap a transport.

        Args:
            transport: the one below.
            loop: that it belongs to.
            unread: shared by all connections of the process.
            patience_s: how long a client may take over the last reply, once the connection is to be closed.
            is_receiving: whether the client is in the middle of a request.
        """
        self._transport = transport
        self._loop = loop
        self._unread = unread
        self._patience_s = patience_s
        self._is_receiving = is_receiving
        self._parts: list[bytes] = []
        self._closing = False

    def write(self, data: bytes) -> None:
        """Send bytes together with what else is written in this turn."""
        if not self._parts:
            self._loop.call_soon(self.flush)
        self._parts.append(data)

    def flush(self) -> None:
        """Send at once what was written."""
        if not self._parts:
            return
        parts, self._parts = self._parts, []
        if self._transport.is_closing():  # the client may have gone in between
            return
        self._unread.update(self, self._transport.get_write_buffer_size())
        self._transport.writelines(parts)
        self._unread.update(self, self._transport.get_write_buffer_size())
        self._unread.make_room()

    def is_closing(self) -> bool:
        """Whether nothing more is read or written."""
        return self._closing or self._transport.is_closing()

    def close(self) -> None:
        """Send what was written, and close.

        While the client still sends, the connection is only half closed for a moment: closing it would reset it, and
        the client could lose the reply (RFC 9112, section 9.6).
        """
        if self._closing:
            return
        self.flush()
        self._closing = True
        if self._is_receiving() and not self._transport.is_closing() and self._transport.can_write_eof():
            self._transport.write_eof()
            self._transport.resume_reading()  # what comes is dropped
            self._loop.call_later(LINGER_S, self._close)
        else:
            self._close()

    def forget(self) -> None:
        """Count nothing any more; the connection is gone."""
        self._unread.update(self, 0)

    def _close(self) -> None:
        self._transport.close()
        if self._transport.get_write_buffer_size():
            self._loop.call_later(self._patience_s, self._transport.abort)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
