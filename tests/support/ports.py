"""Ports for servers of the tests, which two workers of pytest never give at the same time.

They lie below the ports that Linux gives to whoever asks for any, so that between the look and the server's start
nobody else is given one.
"""

import os
import random
import socket
from collections.abc import Iterator

from service.runtime.ports import TritonPorts

_FIRST, _PORTS, _WORKERS = 12_000, 1_200, 16


def _candidates() -> Iterator[int]:
    """The ports of this worker, over and over, from any of them on: another run of the tests may have the same."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _WORKERS
    begin = random.Random(os.getpid()).randrange(_PORTS)
    while True:
        for number in range(_PORTS):
            yield _FIRST + worker * _PORTS + (begin + number) % _PORTS


_NEXT = _candidates()


def free_port(host: str = "127.0.0.1") -> int:
    """A port where nobody listens, and that was not given before."""
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
    """The three ports of a Triton."""
    return TritonPorts(free_port(), free_port(), free_port())
