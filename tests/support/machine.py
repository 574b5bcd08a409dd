"""The machine, which the workers of one run of pytest share."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def machine(shared: Path, *, alone: bool) -> Iterator[None]:
    """Hold the machine for a block: together with other tests, or alone.

    Whoever comes passes the gate first. Who wants to be alone keeps it closed while it waits, and so does not wait for
    ever.

    Args:
        shared: a folder that all workers have.
        alone: whether nobody else may hold the machine meanwhile.
    """
    with (
        _locked(shared / "gate", fcntl.LOCK_EX) as gate,
        _locked(shared / "room", fcntl.LOCK_EX if alone else fcntl.LOCK_SH),
    ):
        fcntl.flock(gate, fcntl.LOCK_UN)
        yield


@contextlib.contextmanager
def _locked(path: Path, kind: int) -> Iterator[IO[str]]:
    with path.open("a") as file:
        fcntl.flock(file, kind)
        yield file
