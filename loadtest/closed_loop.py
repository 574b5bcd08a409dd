"""The light load client of every measurement but the sweep: connections with one request at a time, in one event loop.

Clients share the cores with the servers they measure, so requests are bytes made beforehand, and replies are kept as
bytes and read after the clock has stopped. The sweep uses Locust, which adds fixed rates and several machines.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import httptools

from bertqa.backoff import RETRIED_STATUSES, spread


@dataclass(slots=True)
class Reply:
    """The outcome of one question."""

    key: int  # which question it was
    seconds: float  # from the first attempt to the last byte, waits included
    status: int  # HTTP status of the last attempt; 0 if there was none
    body: bytes  # or the reason why there was none
    shed: int  # attempts that were refused and made again
    attempt_s: float = 0.0  # of the last attempt alone
    ended_s: float = 0.0  # after the first request of the load


@dataclass(slots=True)
class Load:
    """The replies to one run of clients."""

    replies: list[Reply] = field(default_factory=list)
    seconds: float = 0.0  # from the first request to the last reply
    client_cpu: float = 0.0  # seconds of CPU time that the clients themselves took


def http_get(host: str, port: int, path: str) -> bytes:
    """One kept-alive GET request as it goes over the wire."""
    return f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode()


def http_post(host: str, port: int, path: str, body: bytes) -> bytes:
    """One kept-alive JSON request as it goes over the wire."""
    head = f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def closed_loop(
    host: str,
    port: int,
    requests: Iterator[tuple[int, bytes]],
    clients: int,
    *,
    until: Callable[[int], bool],
    timeout_s: float = 60.0,
    retries: bool = True,
    pace_s: float = 0.0,
) -> Load:
    """Keep a number of clients busy.

    Args:
        host: of the server.
        port: likewise.
        requests: a key and the bytes of `http_post`; each client takes the next one when it is free.
        clients: connections.
        until: asked before each request with the number of those sent; true ends the run, once all are answered.
        timeout_s: for one attempt, after which the connection is made anew, and for one question with all its attempts:
            a client that is told ``retry-after`` waits that long, and a little longer, and asks the same again.
        retries: without, a refusal is the reply, and the next question follows.
        pace_s: from one request of a client to its next, at least; clients begin spread over it.
    """
    load, sent = Load(), 0

    async def client(number: int) -> None:
        nonlocal sent
        connection = _Connection(host, port)
        next_at = time.perf_counter() + number / clients * pace_s
        while not until(sent):
            if pace_s:
                await asyncio.sleep(max(next_at - time.perf_counter(), 0))
                next_at = max(next_at + pace_s, time.perf_counter())
            sent += 1
            key, request = next(requests)
            began, shed = time.perf_counter(), 0
            while True:
                attempt = time.perf_counter()
                status, wait_s, body = await connection.attempt(request, timeout_s)
                if not retries or status not in RETRIED_STATUSES or wait_s is None:
                    break
                wait_s = spread(wait_s)
                if time.perf_counter() + wait_s - began > timeout_s:
                    break
                shed += 1
                await asyncio.sleep(wait_s)
            ended = time.perf_counter()
            load.replies.append(Reply(key, ended - began, status, body, shed, ended - attempt, ended - load_began))
        connection.close()

    cpu, load_began = time.process_time(), time.perf_counter()
    await asyncio.gather(*map(client, range(clients)))
    load.seconds, load.client_cpu = time.perf_counter() - load_began, time.process_time() - cpu
    return load


def for_seconds(seconds: float) -> Callable[[int], bool]:
    """An ``until`` that ends a load after a time, which begins now."""
    end = time.perf_counter() + seconds
    return lambda _: time.perf_counter() >= end


def for_requests(requests: int) -> Callable[[int], bool]:
    """An ``until`` that ends a load after a number of requests."""
    return lambda sent: sent >= requests


class _Connection(asyncio.Protocol):
    """One connection, made when first needed and again after it was lost; the methods of httptools' parser too."""

    def __init__(self, host: str, port: int) -> None:
        self._address = host, port
        self._transport: asyncio.Transport | None = None

    async def attempt(self, request: bytes, timeout_s: float) -> tuple[int, float | None, bytes]:
        """Send a request as `exchange` does; if there is no reply, returns status 0 and the error as the body."""
        try:
            return await asyncio.wait_for(self.exchange(request), timeout_s)
        except (OSError, asyncio.TimeoutError, httptools.HttpParserError) as error:
            self.close()
            await asyncio.sleep(0.05)  # so that a dead server does not cause a busy loop
            return 0, None, repr(error).encode()

    async def exchange(self, request: bytes) -> tuple[int, float | None, bytes]:
        """Send a request; returns the status, the seconds of Retry-After if there is one, and the body."""
        loop = asyncio.get_running_loop()
        if self._transport is None:
            self._transport, _ = await loop.create_connection(lambda: self, *self._address)
        self._reply: asyncio.Future[tuple[int, float | None, bytes]] = loop.create_future()
        self._parser = httptools.HttpResponseParser(self)
        self._body = bytearray()
        self._retry_after: float | None = None
        self._transport.write(request)
        return await self._reply

    def close(self) -> None:
        """End the connection."""
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    def data_received(self, data: bytes) -> None:
        """Of asyncio."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            if not self._reply.done():
                self._reply.set_exception(error)

    def connection_lost(self, exc: Exception | None) -> None:
        """Of asyncio."""
        self._transport = None
        if not self._reply.done():
            self._reply.set_exception(exc or ConnectionResetError("closed without a reply"))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Of httptools."""
        if name.lower() == b"retry-after" and value.isdigit():
            self._retry_after = float(value)

    def on_body(self, body: bytes) -> None:
        """Of httptools."""
        self._body += body

    def on_message_complete(self) -> None:
        """Of httptools."""
        if not self._parser.should_keep_alive() and self._transport is not None:
            self._transport.close()
            self._transport = None
        if not self._reply.done():
            self._reply.set_result((self._parser.get_status_code(), self._retry_after, bytes(self._body)))
