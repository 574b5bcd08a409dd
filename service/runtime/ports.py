"""TCP ports of this machine: which are free, who has the others, and how to keep one."""

import contextlib
import errno
import itertools
import socket
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import psutil

LOOPBACK = "127.0.0.1"


class PortError(RuntimeError):
    """A port cannot be listened on; the message says why and what to do."""


@dataclass(frozen=True)
class TritonPorts:
    """Ports that Triton listens on; where one is taken, the next free one is used in its place."""

    grpc: int = 8001
    metrics: int = 8002
    http: int = 8003  # Triton's own default, 8000, is where the service listens

    def free(self, avoid: Iterable[int] = (), *, host: str = LOOPBACK) -> "TritonPorts":
        """These ports, or for each that is taken or to be avoided the next one that is not.

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
    """The wanted port if nothing listens there, else the next one up that is free; 0 takes any.

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
    """Bind a port without listening, so that nobody else is given it; 0 takes any.

    A server that sets SO_REUSEADDR, as uvicorn does, can listen on it all the same. Until it does, clients are refused
    at once, as they are while it restarts.

    Args:
        host: the address.
        port: the port.
        option: the command line option that chooses another one.

    Raises:
        PortError: the port is taken, or may not be used; the message names who listens there, if that can be seen.
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
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: TIME_WAIT is not "taken"
    try:
        held.bind((host, port))
    except OSError as error:
        held.close()
        if error.errno == errno.EADDRINUSE:
            raise _Taken from None
        if isinstance(error, PermissionError):
            raise PortError(f"port {port}: needs privileges; choose one above 1023") from None
        raise PortError(f"{host}: cannot listen there ({error.strerror})") from None
    return held


def _listener(port: int) -> str:
    """The process that listens on a port, empty if it belongs to another user."""
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (port,) and connection.pid:
                return f"process {connection.pid} ({psutil.Process(connection.pid).name()})"
    return ""
