"""uvicorn's HTTP protocol with limits for clients; it sends each reply in one piece.

uvicorn has no timeout for the rest of a request, for a client that does not read its reply, or for a connection that
never sends anything. It limits neither the head of a request nor the number of pipelined requests. This protocol adds
these limits. With too many connections, it closes the one that has been idle longest. The bytes of request bodies and
unread replies are limited over all connections of the process.

uvicorn writes the head of a reply and then its body, in two system calls and two packets. A process killed in between
leaves a head without a body, and no load balancer can retry such a request. Without the head, it would have retried on
another replica. (On a busy machine the kernel tends to run the reader in between: of twelve replicas killed under load,
one lost a reply that way.)
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service.api.deadline import GONE
from service.api.errors import (
    STATUS,
    HeadTooLarge,
    MalformedHttp,
    RequestError,
    SlowRequest,
    TooManyConnections,
    error_response,
)
from service.inference.memory import MemoryBudget
from service.observability.metrics import Metrics
from service.runtime.request_bodies import RequestBodies
from service.runtime.transport import JoiningTransport, Unread
from service.services import Services
from service.settings import Settings

if TYPE_CHECKING:
    from uvicorn._types import ASGI3Application
    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

MAX_HEAD_BYTES = 32 * 1024
"""Limit on the bytes of the request line and headers, including trailers."""
MAX_PIPELINED = 16
"""Limit on pipelined requests of a connection that wait for an earlier one."""
MAX_BODIES_BYTES = 32 * 1024 * 1024
"""Limit on the bytes of request bodies in a process, from arrival to reply; at least one full body always fits."""


class BoundedProtocol(HttpToolsProtocol):
    """The protocol with limits, over a transport that joins all writes of one event loop iteration.

    `service.app` puts its ``services`` into the lifespan state, where this class finds them.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        services: Services | None = self.app_state.get("services")
        self._settings = services.settings if services else Settings()
        self._metrics = services.metrics if services else Metrics()
        self._gone: asyncio.Future[None] = self.loop.create_future()
        self._extensions: dict[str, Any] = {GONE: self._gone}
        self._arrival: asyncio.TimerHandle | None = None  # timeout for a request, or the rest of one
        self._taking: asyncio.TimerHandle | None = None  # timeout for a client to read its reply
        self._waiting_since = self.loop.time()
        self._head_bytes = 0
        self._problem: RequestError | None = None
        self._body_sizes: deque[int] = deque()  # of each request without a complete reply
        self._is_receiving = False  # in the middle of a request
        self._in_body = False
        self._head_is_known = False  # the parser reads a head that was already parsed
        self._is_waiting = False  # the next request waits until the client has read the reply
        self._running: RequestResponseCycle | None = None  # uvicorn's `cycle` is the latest to arrive
        self._last_reply: bytes | None = None  # sent after the replies to earlier requests
        self._unread: Unread = self.app_state.setdefault("unread", Unread())
        memory = services.pipeline.memory if services else MemoryBudget(self._settings.max_memory_mb << 20)
        most = max(MAX_BODIES_BYTES, self._settings.max_body_bytes)
        self._bodies: RequestBodies = self.app_state.get("bodies") or self.app_state.setdefault(
            "bodies", RequestBodies(most, memory)
        )

    @property
    def body_bytes(self) -> int:
        """Bytes of the request bodies that the connection holds."""
        return sum(self._body_sizes)

    # Called by asyncio

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wrap and keep the transport; with too many connections, close an idle one or this one."""
        joining = JoiningTransport(
            transport,
            self.loop,
            self._unread,
            patience_s=self._settings.arrival_s,
            is_receiving=lambda: self._is_receiving and len(self.connections) <= self._settings.max_connections,
        )
        super().connection_made(joining)  # type: ignore[arg-type]  # it behaves like a transport
        self._metrics.connections.inc()
        self._expect_request()
        if len(self.connections) > self._settings.max_connections:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        """Release everything that the connection holds."""
        self._metrics.connections.dec()
        for timer in (self._arrival, self._taking):
            if timer:
                timer.cancel()
        self._bodies.ended(self)
        self._bodies.free(self.body_bytes)
        self._body_sizes.clear()
        self.pipeline.clear()
        if not self._gone.done():
            self._gone.set_result(None)
        if self._running and not self._running.response_complete:  # uvicorn notifies only the latest
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)
        joining: Any = self.transport
        joining.forget()

    def data_received(self, data: bytes) -> None:
        """Parse the data; a connection that is idle afterwards gets a timeout."""
        if self.transport.is_closing() or self._last_reply is not None:
            return
        self._unset_keepalive_if_required()
        try:
            while data:
                data = self._parse(data)
        except httptools.HttpParserError:
            self._refuse(self._problem or MalformedHttp("not an HTTP request"))
        if self._arrival is None and _is_idle(self):
            self._expect_request()

    def pause_writing(self) -> None:
        """Start the timeout for a client that does not read its reply."""
        super().pause_writing()
        self._taking = self.loop.call_later(self._settings.arrival_s, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop that timeout, and continue with the next request."""
        super().resume_writing()
        if self._taking:
            self._taking.cancel()
        if self._is_waiting:
            self._is_waiting = False
            self._go_on()

    # Called by the parser; exceptions propagate to `data_received`

    def on_message_begin(self) -> None:
        """Start a request and its arrival timeout."""
        if self._head_is_known:
            return
        self._is_receiving = True
        if len(self.pipeline) >= MAX_PIPELINED:
            self._raise(MalformedHttp(f"more than {MAX_PIPELINED} pipelined requests are waiting"))
        super().on_message_begin()
        self.scope["extensions"] = self._extensions
        self._head_bytes = 0
        self._expect_request()

    def on_url(self, url: bytes) -> None:
        """Add a piece of the URL."""
        if self._head_is_known:
            return
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Add a header or a trailer."""
        if self._head_is_known:
            return
        self._count(len(name) + len(value) + 4)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Check the complete head, and start the application."""
        if self._head_is_known:
            return
        if problem := _ambiguity(self.parser.get_http_version(), self.headers):
            self._raise(MalformedHttp(problem))
        super().on_headers_complete()
        self._body_sizes.append(0)
        self._in_body = True

    def on_body(self, body: bytes) -> None:
        """Add a piece of the body; drop it if the request is already answered or rejected."""
        if not self.cycle.response_complete and "refusal" not in self.cycle.scope:
            super().on_body(body)
            self._body_sizes[-1] += len(body)
            self._bodies.add(self, len(body))

    def on_message_complete(self) -> None:
        """End a complete request."""
        if self.parser.should_upgrade():
            return  # the parser skips the body; see `_parse`
        if self._arrival:
            self._arrival.cancel()
            self._arrival = None
        self._is_receiving = self._in_body = False
        self._bodies.ended(self)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Send the complete reply, before the application counts and logs it."""
        joining: Any = self.transport
        joining.flush()
        self._bodies.free(self._body_sizes.popleft())
        if self._in_body and not self._body_sizes:  # answered before the body was complete
            self._bodies.ended(self)
        if self.flow.write_paused and not self.transport.is_closing():
            self._is_waiting = True  # or further replies would pile up in memory
            self.flow.pause_reading()
        else:
            self._go_on()

    def _should_upgrade(self) -> bool:
        return False

    def _start_asgi_task(self, cycle: "RequestResponseCycle", app: "ASGI3Application") -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    # Our own methods

    def refuse_body(self, problem: RequestError) -> None:
        """Drop the body that is arriving, and let the application reject its request."""
        self._bodies.ended(self)
        self._bodies.free(self._body_sizes[-1])
        self._body_sizes[-1] = 0
        self.cycle.body = bytearray()
        self._end_wait_for_body(problem)

    def _end_wait_for_body(self, problem: RequestError) -> None:
        self.cycle.scope["refusal"] = problem  # type: ignore[typeddict-unknown-key]  # read by `service.middleware.body_limit`
        self.cycle.message_event.set()

    def _parse(self, data: bytes) -> bytes:
        """Feed the parser; returns the data that it left, which follows the head of a request with ``Upgrade``.

        We support no upgrades, and RFC 9110, section 7.8, lets a server ignore the header. The parser cannot ignore it:
        it treats the rest as another protocol. So a new parser continues after a head without that header.
        """
        try:
            self.parser.feed_data(data)
            return b""
        except httptools.HttpParserUpgrade as upgrade:
            left = data[upgrade.args[0] :]
        head = [b"POST / HTTP/1.1", *(b"%b: %b" % each for each in self.headers if each[0] in _FRAMING)]
        if not self.parser.should_keep_alive():
            head.append(b"connection: close")
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        self._head_is_known = True
        self.parser.feed_data(b"\r\n".join(head) + b"\r\n\r\n")
        self._head_is_known = False
        return left

    def _go_on(self) -> None:
        """Start the next request, or wait for one, after a reply has been sent."""
        super().on_response_complete()
        if self._last_reply is not None and not self._body_sizes:
            self._say_last()

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > MAX_HEAD_BYTES:
            self._raise(HeadTooLarge(MAX_HEAD_BYTES))

    def _raise(self, problem: RequestError) -> NoReturn:
        self._problem = problem
        raise problem

    def _expect_request(self) -> None:
        if self._arrival:
            self._arrival.cancel()
        self._waiting_since = self.loop.time()
        self._arrival = self.loop.call_later(self._settings.arrival_s, self._give_up)

    def _give_up(self) -> None:
        self._arrival = None
        if self.flow.read_paused:  # we are the ones who are not reading
            self._expect_request()
        elif self.cycle and not self.cycle.response_complete:
            self._end_wait_for_body(SlowRequest(self._settings.arrival_s))
        elif self._head_bytes and not self.cycle:
            self._refuse(SlowRequest(self._settings.arrival_s))
        else:  # nothing arrived, or a body that nobody waits for
            self.transport.close()

    def _make_room(self) -> None:
        others: list[Any] = [each for each in self.connections if each is not self and not each.transport.is_closing()]
        if len(others) < self._settings.max_connections:
            return
        idle = [each for each in others if _is_idle(each)]
        if idle:
            min(idle, key=lambda each: each._waiting_since).transport.close()
        else:
            self._refuse(TooManyConnections(self._settings.max_connections))

    def _refuse(self, problem: RequestError) -> None:
        """Send an error after the replies to earlier requests, without the application, and close."""
        if self._last_reply is not None:
            return
        status, error_type = STATUS[type(problem)]
        self._metrics.requested("unmatched", status, error_type, None)
        response = error_response(status, error_type, str(problem), headers={"connection": "close"})
        head = b"".join(b"%b: %b\r\n" % header for header in response.raw_headers)
        self._last_reply = STATUS_LINE[status] + head + b"\r\n" + bytes(response.body)
        if self._in_body:
            self._take_back()
        if self._body_sizes:
            self.flow.pause_reading()
        else:
            self._say_last()

    def _take_back(self) -> None:
        """Stop the application from answering the arriving request; if it has begun to answer, send no error."""
        cycle = self.cycle
        if cycle.response_started:
            self._last_reply = b""
        if not cycle.response_complete:
            self._bodies.ended(self)
            self._bodies.free(self._body_sizes.pop())
            if self.pipeline and self.pipeline[0][0] is cycle:
                self.pipeline.popleft()
            cycle.disconnected = True
            cycle.message_event.set()

    def _say_last(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(self._last_reply or b"")
            self.transport.close()


def _is_idle(connection: Any) -> bool:
    """Return whether no request on the connection is being received or answered."""
    return connection.cycle is None or bool(connection.cycle.response_complete)


_FRAMING = (b"content-length", b"transfer-encoding")


def _ambiguity(version: str, headers: Sequence[tuple[bytes, bytes]]) -> str | None:
    """Return why RFC 9112 forbids a head that two servers could read differently, or None.

    The parser itself rejects a second content-length, and one next to a transfer-encoding.
    """
    hosts = sum(name == b"host" for name, _ in headers)
    if hosts > 1 or (not hosts and version != "1.0"):
        return f"host: the header must be present once; got {hosts}"
    codings = [value for name, value in headers if name == b"transfer-encoding"]
    if codings and version == "1.0":
        return "transfer-encoding: not allowed in HTTP/1.0"
    if codings and [each.strip().lower() for each in codings] != [b"chunked"]:
        return "transfer-encoding: must be chunked"
    return None
