"""TCP ports of this machine: find free ones, name the owner of a taken one, and reserve one."""

import contextlib
import errno
import itertools
import socket
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import psutil

LOOPBACK = "127.0.0.1"


class PortError(RuntimeError):
    """A port is not available; the message says why and what to do."""


@dataclass(frozen=True)
class TritonPorts:
    """Ports for Triton to listen on; if one is taken, the next free port is used."""

    grpc: int = 8001
    metrics: int = 8002
    http: int = 8003  # Triton's default, 8000, is the port of the service

    def free(self, avoid: Iterable[int] = (), *, host: str = LOOPBACK) -> "TritonPorts":
        """Return these ports, with each taken or avoided one replaced by the next free port.

        Raises:
            PortError: as `free_port`.
        """
        taken = set(avoid)
        found: dict[str, int] = {}
        for name in ("grpc", "metrics", "http"):
            found[name] = free_port(host, getattr(self, name), avoid=taken)
            taken.add(found[name])
        return TritonPorts(**found)


def free_port(host: str, wanted: int, *, avoid: Collection[int] = ()) -> int:
    """Return the wanted port if it is free, else the next free port; for 0, any free port.

    Raises:
        PortError: the address does not belong to this machine, or none of the 100 ports after it is free.
    """
    candidates = range(wanted, min(wanted + 100, 65536)) if wanted else itertools.repeat(0, 100)
    for port in candidates:
        if port in avoid:
            continue
        with contextlib.suppress(_Taken), _bound(host, port) as probe:
            found = int(probe.getsockname()[1])
            if found not in avoid:
                return found
    raise PortError(f"no free port from {wanted} to {wanted + 99} on {host}; choose another")


def hold_port(host: str, port: int, option: str) -> socket.socket:
    """Reserve a port by binding it without listening; 0 takes any.

    A server that sets SO_REUSEADDR, such as uvicorn, can still listen on it. Until it does, and while it restarts,
    clients get "connection refused" at once.

    Args:
        host: address to bind.
        port: port to bind.
        option: command line option for another port; the message names it.

    Raises:
        PortError: the port is taken or not allowed; the message names the process that listens there, if known.
    """
    try:
        return _bound(host, port)
    except _Taken:
        owner = _listener(port)
        raise PortError(
            f"port {port} of {host} is taken{f' by {owner}' if owner else ''}; choose another one with {option}, "
            f"or any free one with {option} 0"
        ) from None


class _Taken(Exception):
    pass


def _bound(host: str, port: int) -> socket.socket:
    held = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    held.setsockopt(
        socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
    )  # as servers do, so that TIME_WAIT does not count as taken
    try:
        held.bind((host, port))
    except OSError as error:
        held.close()
        if error.errno == errno.EADDRINUSE:
            raise _Taken from None
        if isinstance(error, PermissionError):
            raise PortError(f"port {port}: requires root privileges; choose a port above 1023") from None
        raise PortError(f"{host}: cannot listen there ({error.strerror})") from None
    return held


def _listener(port: int) -> str:
    """Return the process that listens on a port; empty if it belongs to another user."""
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (port,) and connection.pid:
                return f"process {connection.pid} ({psutil.Process(connection.pid).name()})"
    return ""
