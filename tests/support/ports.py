"""Ports for test servers; two pytest workers never get the same port at the same time.

They are below Linux's ephemeral ports, so that no other process gets one between the check and the server's start.
"""

import os
import random
import socket
from collections.abc import Iterator

from service.runtime.ports import TritonPorts

_FIRST, _PORTS, _WORKERS = 12_000, 1_200, 16


def _candidates() -> Iterator[int]:
    """Cycle through this worker's ports from a random start, because another test run may use the same ports."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _WORKERS
    begin = random.Random(os.getpid()).randrange(_PORTS)
    while True:
        for number in range(_PORTS):
            yield _FIRST + worker * _PORTS + (begin + number) % _PORTS


_NEXT = _candidates()


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port that nobody listens on and that was not returned before."""
    for _ in range(_PORTS):
        port = next(_NEXT)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: TIME_WAIT is not "taken"
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return port
    raise OSError(f"all {_PORTS} ports of this worker are taken")


def triton_ports() -> TritonPorts:
    """Return the three ports of a Triton."""
    return TritonPorts(free_port(), free_port(), free_port())
