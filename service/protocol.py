"""uvicorn's HTTP protocol, with bounds on what a client may take, and every reply in one piece.

uvicorn waits without end for the rest of a request and for a reply to be taken, keeps a connection that has never sent
anything, and has no bound on a request's head or on how many requests wait behind one another. Here each has one, and
when there are too many connections, the one that has been idle longest makes room.

uvicorn writes the head of a reply and then its body: two system calls and two packets. A process that is killed between
them leaves a head without a body, which nobody can mend, where a load balancer would have sent the request to another
replica had it seen nothing. (On a busy machine the kernel likes to run the reader in between, for it has just become
ready: of twelve replicas killed under load, one lost a reply that way.)
"""

import asyncio
from typing import Any, NoReturn

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service.errors import (
    STATUS,
    HeadTooLarge,
    MalformedHttp,
    RequestError,
    SlowRequest,
    TooManyConnections,
    error_response,
)
from service.metrics import Metrics
from service.settings import Settings

MAX_HEAD_BYTES = 32 * 1024
"""Bytes of a request's line and headers, trailers included."""
MAX_PIPELINED = 16
"""Requests of a connection that may wait for the one before them."""


class BoundedProtocol(HttpToolsProtocol):
    """The protocol with bounds, over a transport that joins what is written in one turn of the event loop.

    The application's state has its ``settings`` and ``metrics``, as `service.app` leaves them there.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._settings: Settings = self.app_state.get("settings") or Settings()
        self._metrics: Metrics = self.app_state.get("metrics") or Metrics()
        self._arrival: asyncio.TimerHandle | None = None  # ends the wait for a request, or for the rest of one
        self._taking: asyncio.TimerHandle | None = None  # ends the wait for a reply to be taken
        self._waiting_since = self.loop.time()
        self._head_bytes = 0
        self._problem: RequestError | None = None

    # As asyncio calls it

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the transport, wrapped; if there are too many, close an idle one or this one."""
        joining = _Joining(transport, self.loop, self._settings.arrival_s)
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
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse; whatever came, a connection that is idle afterwards is not kept for ever."""
        if self.transport.is_closing():
            return
        super().data_received(data)
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

    # As the parser calls it; what is raised comes back in `send_400_response`

    def on_message_begin(self) -> None:
        """A request begins, which must arrive in time."""
        if len(self.pipeline) >= MAX_PIPELINED:
            self._raise(MalformedHttp(f"more than {MAX_PIPELINED} requests wait behind one another"))
        super().on_message_begin()
        self._head_bytes = 0
        self._expect_request()

    def on_url(self, url: bytes) -> None:
        """A piece of the address."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer."""
        self._count(len(name) + len(value) + 4)
        super().on_header(name, value)

    def on_message_complete(self) -> None:
        """The request is here."""
        if self._arrival:
            self._arrival.cancel()
            self._arrival = None
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """The reply is whole, and leaves before the application counts and logs it."""
        joining: Any = self.transport
        joining.flush()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what could not be parsed."""
        self._refuse(self._problem or MalformedHttp("not an HTTP request"))

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
            self.cycle.scope["overdue"] = True  # type: ignore[typeddict-unknown-key]  # read by `service.edge`
            self.cycle.message_event.set()
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
        """Answer in place of the application, unless that has a reply under way, and close."""
        status, error_type = STATUS[type(problem)]
        self._metrics.requested("unmatched", status, error_type, None)
        cycle = self.cycle
        if cycle is None or cycle.response_complete or (not cycle.response_started and cycle.more_body):
            response = error_response(status, error_type, str(problem), headers={"connection": "close"})
            head = b"".join(b"%b: %b\r\n" % header for header in response.raw_headers)
            self.transport.write(STATUS_LINE[status] + head + b"\r\n" + bytes(response.body))
        self.transport.close()


def _is_idle(connection: Any) -> bool:
    """Whether no application waits for a request on it, or for its reply to leave."""
    return connection.cycle is None or bool(connection.cycle.response_complete)


class _Joining:
    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, patience_s: float) -> None:
        self._transport = transport
        self._loop = loop
        self._patience_s = patience_s  # for a client that does not take the last reply
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> None:
        if not self._parts:
            self._loop.call_soon(self.flush)
        self._parts.append(data)

    def close(self) -> None:
        self.flush()
        self._transport.close()
        if self._transport.get_write_buffer_size():
            self._loop.call_later(self._patience_s, self._transport.abort)

    def flush(self) -> None:
        if self._parts:
            data = b"".join(self._parts)
            self._parts.clear()
            if not self._transport.is_closing():  # the client may have gone in between
                self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
