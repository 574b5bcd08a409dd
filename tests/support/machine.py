"""A lock for the machine, shared by the workers of one pytest run."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def machine(shared: Path, *, alone: bool) -> Iterator[None]:
    """Hold the machine during a block, together with other tests or alone.

    Every test first passes a gate. A test that wants to be alone keeps the gate closed while it waits, so it does not
    wait forever.

    Args:
        shared: a folder shared by all workers.
        alone: whether no other test may hold the machine meanwhile.
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
