"""Temporary files owned by one process, and the removal of those whose owner was killed.

An owner holds a lock (flock) on its files. The kernel releases it when the owner ends in any way, so a process that
gets the lock knows that the files are unused. Unlike a process id, a lock means the same in every container.
"""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import stat
import tempfile
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")

_NAME = re.compile(r"bertqa_\d+_[0-9a-f]{8}")  # the process id is only for people


class Claim:
    """Owns all entries of a directory with a certain prefix; other processes do not remove them while we live."""

    def __init__(self, path: Path, lock: int) -> None:
        """Own a locked file or directory, given with its open descriptor."""
        self.path = path
        self._lock = lock

    @classmethod
    def directory(cls) -> "Claim":
        """Create a directory for temporary files that only this user can read."""
        while True:
            path = Path(tempfile.gettempdir()) / _new_name()
            path.mkdir(mode=0o700)
            if (lock := _lock(path)) is not None:
                return cls(path, lock)

    @classmethod
    def shared_memory(cls) -> "Claim":
        """Create a prefix for shared memory names, and an empty file with that name."""
        while True:
            path = SHARED_MEMORY / _new_name()
            path.touch(mode=0o600, exist_ok=False)
            if (lock := _lock(path)) is not None:
                return cls(path, lock)

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def clear(self) -> None:
        """Remove what other processes created under the prefix; keep our own file or directory."""
        for path in self.path.parent.glob(f"{self.path.name}?*"):
            with contextlib.suppress(OSError):  # it no longer exists, or belongs to another user
                path.unlink()

    def remove(self) -> None:
        """Remove everything; safe to call again."""
        self.clear()
        if self.path.is_dir():
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            self.path.unlink(missing_ok=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def remove_leftovers() -> list[Path]:
    """Remove shared memory and temporary files of this user's killed processes; returns the removed paths."""
    removed = []
    for parent in (Path(tempfile.gettempdir()), SHARED_MEMORY):
        for path in sorted(parent.glob("bertqa_*")):
            if _NAME.fullmatch(path.name) and (lock := _lock(path)) is not None:
                Claim(path, lock).remove()
                removed.append(path)
    return removed


def _new_name() -> str:
    return f"bertqa_{os.getpid()}_{secrets.token_hex(4)}"


def _lock(path: Path) -> int | None:
    """Return a descriptor that holds the lock; None if another process holds it, or the file is gone or not ours."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found = os.fstat(descriptor)
        of_a_kind = stat.S_ISDIR(found.st_mode) or stat.S_ISREG(found.st_mode)
        if of_a_kind and found.st_uid == os.geteuid() and os.path.samestat(found, os.stat(path)):
            return descriptor
    os.close(descriptor)
    return None
