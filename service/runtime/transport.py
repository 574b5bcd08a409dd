"""The transport below uvicorn's protocol: joins writes, limits unread replies, closes cleanly."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

log = logging.getLogger("bertqa.service")

MAX_UNREAD_BYTES = 64 * 1024 * 1024
"""Limit on the bytes of unread replies in a process."""
LINGER_S = 1.0
"""Seconds that a connection stays open after its last reply if the client is still sending."""


class Unread:
    """Counts the bytes of unread replies of a process, and limits them."""

    def __init__(self, limit: int = MAX_UNREAD_BYTES) -> None:
        self.bytes = 0
        self._limit = limit
        self._sizes: dict[JoiningTransport, int] = {}  # the slowest client comes first

    def update(self, transport: "JoiningTransport", size: int) -> None:
        """Set how many bytes wait in a transport."""
        self.bytes += size - self._sizes.get(transport, 0)
        if size:
            self._sizes[transport] = size
        else:
            self._sizes.pop(transport, None)

    def make_room(self) -> None:
        """Abort the connections of the slowest clients until the rest fits."""
        if self.bytes <= self._limit:
            return
        for each in list(self._sizes):  # clients may have read more since the last write
            self.update(each, each.get_write_buffer_size())
        for each in list(self._sizes):
            if self.bytes <= self._limit:
                return
            log.warning("closed the connection of a slow client: over %d bytes of replies were unread", self._limit)
            each.abort()
            self.update(each, 0)


class JoiningTransport:
    """A transport that joins all writes of one event loop iteration, and delegates the rest to the one below."""

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
            transport: the transport below.
            loop: its event loop.
            unread: shared by all connections of the process.
            patience_s: seconds for a client to read the last reply when the connection closes.
            is_receiving: returns whether the client is in the middle of a request.
        """
        self._transport = transport
        self._loop = loop
        self._unread = unread
        self._patience_s = patience_s
        self._is_receiving = is_receiving
        self._parts: list[bytes] = []
        self._closing = False

    def write(self, data: bytes) -> None:
        """Send bytes together with the other writes of this iteration."""
        if not self._parts:
            self._loop.call_soon(self.flush)
        self._parts.append(data)

    def flush(self) -> None:
        """Send all writes now."""
        if not self._parts:
            return
        parts, self._parts = self._parts, []
        if self._transport.is_closing():  # the client may have disconnected
            return
        self._unread.update(self, self._transport.get_write_buffer_size())
        self._transport.writelines(parts)
        self._unread.update(self, self._transport.get_write_buffer_size())
        self._unread.make_room()

    def is_closing(self) -> bool:
        """Return whether the transport is closed or closing."""
        return self._closing or self._transport.is_closing()

    def close(self) -> None:
        """Send all writes and close.

        If the client is still sending, first close only our side for a moment. A full close would reset the connection,
        and the client could lose the reply (RFC 9112, section 9.6).
        """
        if self._closing:
            return
        self.flush()
        self._closing = True
        if self._is_receiving() and not self._transport.is_closing() and self._transport.can_write_eof():
            self._transport.write_eof()
            self._transport.resume_reading()  # received data is dropped
            self._loop.call_later(LINGER_S, self._close)
        else:
            self._close()

    def forget(self) -> None:
        """Stop counting, because the connection is lost."""
        self._unread.update(self, 0)

    def _close(self) -> None:
        self._transport.close()
        if self._transport.get_write_buffer_size():
            self._loop.call_later(self._patience_s, self._transport.abort)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
