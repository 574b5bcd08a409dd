"""Processes of this machine by their command lines, and files of this process in shared memory."""

import os
from pathlib import Path


def processes_with(text: str) -> list[int]:
    """Their ids."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if text in entry.read_bytes().decode(errors="replace"):
                found.append(int(entry.parent.name))
        except OSError:  # ended in between
            continue
    return found


def shared_memory() -> set[Path]:
    """Files of this process in shared memory."""
    return set(Path("/dev/shm").glob(f"bertqa_{os.getpid()}_*"))
