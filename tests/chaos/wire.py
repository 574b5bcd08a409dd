"""HTTP as bytes: what no client library would send, and how long it takes until the last byte of the reply."""

import contextlib
import http.client
import json
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back; status 0: nothing, and why."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)  # names in small letters
    body: bytes = b""
    seconds: float = 0.0  # from the first byte sent to the last one received

    def json(self) -> Any:
        """The body's value."""
        return json.loads(self.body)

    def __str__(self) -> str:
        return f"{self.status} {self.body[:300].decode(errors='replace')} after {self.seconds:.2f} s"


def request(method: str, target: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> bytes:
    """A whole request that closes its connection, unless the headers say otherwise."""
    lines = {"host": "chaos", "connection": "close", **(headers or {})}
    if method == "POST":
        lines = {"content-type": "application/json", "content-length": str(len(body)), **lines}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"{method} {target} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + body


def question(body: object, headers: Mapping[str, str] | None = None, target: str = "/v1/answer") -> bytes:
    """A JSON request."""
    return request("POST", target, json.dumps(body, ensure_ascii=False).encode(), headers)


def exchange(address: Address, sent: bytes, timeout: float = 30.0) -> Reply:
    """Send bytes on a connection of their own and read one reply."""
    began = time.monotonic()
    try:
        with socket.create_connection(address, timeout) as connection:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # before all was read: the reply says why
                connection.sendall(sent)
            return read_reply(connection, began)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return Reply(0, body=repr(error).encode(), seconds=time.monotonic() - began)


def read_reply(connection: socket.socket, began: float) -> Reply:
    """Read one reply from a connection.

    Raises:
        OSError, http.client.HTTPException: there is none, or no whole one.
    """
    response = http.client.HTTPResponse(connection)
    response.begin()
    body = response.read()
    headers = {name.lower(): value for name, value in response.getheaders()}
    return Reply(response.status, headers, body, time.monotonic() - began)


def get(address: Address, target: str, headers: Mapping[str, str] | None = None, timeout: float = 30.0) -> Reply:
    """Fetch a page."""
    return exchange(address, request("GET", target, b"", headers), timeout)
