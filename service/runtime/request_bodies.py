"""The bytes of request bodies that a process holds, with one limit over all connections."""

from typing import Protocol

from service.api.errors import BodiesOverloaded, RequestError
from service.inference.memory import MemoryBudget

SMALL_BODY_BYTES = 16 * 1024
"""A connection that holds no more bytes of bodies than this is never refused for the limit."""


class Receiver(Protocol):
    """A connection that receives bodies; `service.runtime.http_protocol.BoundedProtocol` is the real one."""

    @property
    def body_bytes(self) -> int:
        """Bytes of the bodies that the connection holds."""
        ...

    def refuse_body(self, problem: RequestError) -> None:
        """Drop the body that is arriving and refuse its request."""
        ...


class RequestBodies:
    """Counts the bytes of the request bodies that a process holds, and limits them.

    Above the limit, the arriving bodies that began first are refused. A client that sends slowly cannot block others.
    """

    def __init__(self, limit: int, memory: MemoryBudget) -> None:
        """Begin empty.

        Args:
            limit: bytes of all bodies together.
            memory: the memory budget of the process; it counts the bodies too.
        """
        self.bytes = 0
        self._limit = limit
        self._memory = memory
        self._arriving: dict[Receiver, None] = {}  # in the order in which they began

    def add(self, connection: Receiver, size: int) -> None:
        """Count bytes of a body that is arriving."""
        self._arriving.setdefault(connection)
        self.bytes += size
        self._memory.hold_body(size)
        if self.bytes <= self._limit:
            return
        for each in list(self._arriving):
            if self.bytes <= self._limit:
                return
            if each.body_bytes > SMALL_BODY_BYTES:
                each.refuse_body(BodiesOverloaded(self._limit))

    def ended(self, connection: Receiver) -> None:
        """Note that the connection's last body has arrived, or will not arrive."""
        self._arriving.pop(connection, None)

    def free(self, size: int) -> None:
        """Stop counting bytes that are no longer held."""
        self.bytes -= size
        self._memory.hold_body(-size)
