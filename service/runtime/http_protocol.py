"""uvicorn's HTTP protocol, with bounds on what a client may take, and every reply in one piece.

uvicorn waits without end for the rest of a request and for a reply to be taken, keeps a connection that has never sent
anything, and has no bound on a request's head or on how many requests wait behind one another. Here each has one, and
when there are too many connections, the one that has been idle longest makes room. The bytes of request bodies and of
unread replies are bounded over all connections of the process.

uvicorn writes the head of a reply and then its body: two system calls and two packets. A process that is killed between
them leaves a head without a body, which nobody can mend, where a load balancer would have sent the request to another
replica had it seen nothing. (On a busy machine the kernel likes to run the reader in between, for it has just become
ready: of twelve replicas killed under load, one lost a reply that way.)
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
"""Bytes of a request's line and headers, trailers included."""
MAX_PIPELINED = 16
"""Requests of a connection that may wait for the one before them."""
MAX_BODIES_BYTES = 32 * 1024 * 1024
"""Bytes of request bodies that a process holds, from their arrival to the reply; at least one full body fits."""


class BoundedProtocol(HttpToolsProtocol):
    """The protocol with bounds, over a transport that joins what is written in one turn of the event loop.

    The state of the lifespan has the application's ``services``, as `service.app` leaves them there.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        services: Services | None = self.app_state.get("services")
        self._settings = services.settings if services else Settings()
        self._metrics = services.metrics if services else Metrics()
        self._gone: asyncio.Future[None] = self.loop.create_future()
        self._extensions: dict[str, Any] = {GONE: self._gone}
        self._arrival: asyncio.TimerHandle | None = None  # ends the wait for a request, or for the rest of one
        self._taking: asyncio.TimerHandle | None = None  # ends the wait for a reply to be taken
        self._waiting_since = self.loop.time()
        self._head_bytes = 0
        self._problem: RequestError | None = None
        self._body_sizes: deque[int] = deque()  # of each request that has no whole reply yet
        self._is_receiving = False  # in the middle of a request
        self._in_body = False
        self._head_is_known = False  # the parser reads a head that was parsed before
        self._is_waiting = False  # with the next request, until the reply to the last one is taken
        self._running: RequestResponseCycle | None = None  # uvicorn's `cycle` is the last one that came
        self._last_reply: bytes | None = None  # written when the requests before it are answered
        self._unread: Unread = self.app_state.setdefault("unread", Unread())
        memory = services.pipeline.memory if services else MemoryBudget(self._settings.max_memory_mb << 20)
        most = max(MAX_BODIES_BYTES, self._settings.max_body_bytes)
        self._bodies: RequestBodies = self.app_state.get("bodies") or self.app_state.setdefault(
            "bodies", RequestBodies(most, memory)
        )

    @property
    def body_bytes(self) -> int:
        """Bytes of the bodies of all its requests that are held."""
        return sum(self._body_sizes)

    # As asyncio calls it

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the transport, wrapped; if there are too many, close an idle one or this one."""
        joining = JoiningTransport(
            transport,
            self.loop,
            self._unread,
            patience_s=self._settings.arrival_s,
            is_receiving=lambda: self._is_receiving and len(self.connections) <= self._settings.max_connections,
        )
        super().connection_made(joining)  # type: ignore[arg-type]  # it does what a transport does
        self._metrics.connections.inc()
        self._expect_request()
        if len(self.connections) > self._settings.max_connections:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go of everything."""
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
        if self._running and not self._running.response_complete:  # uvicorn tells the last one alone
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)
        joining: Any = self.transport
        joining.forget()

    def data_received(self, data: bytes) -> None:
        """Parse; whatever came, a connection that is idle afterwards is not kept for ever."""
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
        """The client does not take its reply."""
        super().pause_writing()
        self._taking = self.loop.call_later(self._settings.arrival_s, self.transport.abort)

    def resume_writing(self) -> None:
        """It does."""
        super().resume_writing()
        if self._taking:
            self._taking.cancel()
        if self._is_waiting:
            self._is_waiting = False
            self._go_on()

    # As the parser calls it; what is raised comes back in `data_received`

    def on_message_begin(self) -> None:
        """A request begins, which must arrive in time."""
        if self._head_is_known:
            return
        self._is_receiving = True
        if len(self.pipeline) >= MAX_PIPELINED:
            self._raise(MalformedHttp(f"more than {MAX_PIPELINED} requests wait behind one another"))
        super().on_message_begin()
        self.scope["extensions"] = self._extensions
        self._head_bytes = 0
        self._expect_request()

    def on_url(self, url: bytes) -> None:
        """A piece of the address."""
        if self._head_is_known:
            return
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer."""
        if self._head_is_known:
            return
        self._count(len(name) + len(value) + 4)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The request's head is here; the application may begin."""
        if self._head_is_known:
            return
        if problem := _ambiguity(self.parser.get_http_version(), self.headers):
            self._raise(MalformedHttp(problem))
        super().on_headers_complete()
        self._body_sizes.append(0)
        self._in_body = True

    def on_body(self, body: bytes) -> None:
        """A piece of the body; of a request that is answered or refused already, it is dropped."""
        if not self.cycle.response_complete and "refusal" not in self.cycle.scope:
            super().on_body(body)
            self._body_sizes[-1] += len(body)
            self._bodies.add(self, len(body))

    def on_message_complete(self) -> None:
        """The request is here."""
        if self.parser.should_upgrade():
            return  # the parser passes over the body; see `_parse`
        if self._arrival:
            self._arrival.cancel()
            self._arrival = None
        self._is_receiving = self._in_body = False
        self._bodies.ended(self)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """The reply is whole, and leaves before the application counts and logs it."""
        joining: Any = self.transport
        joining.flush()
        self._bodies.free(self._body_sizes.popleft())
        if self._in_body and not self._body_sizes:  # answered before it was here
            self._bodies.ended(self)
        if self.flow.write_paused and not self.transport.is_closing():
            self._is_waiting = True  # or each further reply would wait in memory too
            self.flow.pause_reading()
        else:
            self._go_on()

    def _should_upgrade(self) -> bool:
        return False

    def _start_asgi_task(self, cycle: "RequestResponseCycle", app: "ASGI3Application") -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    # Our own

    def refuse_body(self, problem: RequestError) -> None:
        """Let the application refuse the request whose body is arriving, and hold no more of that."""
        self._bodies.ended(self)
        self._bodies.free(self._body_sizes[-1])
        self._body_sizes[-1] = 0
        self.cycle.body = bytearray()
        self._end_wait_for_body(problem)

    def _end_wait_for_body(self, problem: RequestError) -> None:
        self.cycle.scope["refusal"] = problem  # type: ignore[typeddict-unknown-key]  # read by `service.middleware.body_limit`
        self.cycle.message_event.set()

    def _parse(self, data: bytes) -> bytes:
        """Feed the parser; returns what it left, which is what follows the head of a request with ``Upgrade``.

        Nothing here is upgraded to, and RFC 9110, section 7.8, lets a server ignore the header. The parser cannot: it
        takes what follows for another protocol. A new one goes on instead, after a head without that header.
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
        """The last reply has left: begin the next request, or wait for one."""
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
        if self.flow.read_paused:  # it is we who do not read
            self._expect_request()
        elif self.cycle and not self.cycle.response_complete:
            self._end_wait_for_body(SlowRequest(self._settings.arrival_s))
        elif self._head_bytes and not self.cycle:
            self._refuse(SlowRequest(self._settings.arrival_s))
        else:  # nothing has come, or a body that nobody waits for
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
        """Answer in place of the application once the requests before are answered, and close."""
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
        """Let the application no longer answer the request that is arriving; if it has begun to, nobody else does."""
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
    """Whether no application waits for a request on it, or for its reply to leave."""
    return connection.cycle is None or bool(connection.cycle.response_complete)


_FRAMING = (b"content-length", b"transfer-encoding")


def _ambiguity(version: str, headers: Sequence[tuple[bytes, bytes]]) -> str | None:
    """What RFC 9112 forbids of a head because two servers could read it in two ways, or None.

    The parser itself refuses a content-length beside another or beside a transfer-encoding.
    """
    hosts = sum(name == b"host" for name, _ in headers)
    if hosts > 1 or (not hosts and version != "1.0"):
        return f"host: must stand once among the headers; it stands {hosts} times"
    codings = [value for name, value in headers if name == b"transfer-encoding"]
    if codings and version == "1.0":
        return "transfer-encoding: HTTP/1.0 has none"
    if codings and [each.strip().lower() for each in codings] != [b"chunked"]:
        return "transfer-encoding: must be chunked"
    return None
