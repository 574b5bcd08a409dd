"""Temporary files that belong to one process, and the removal of those whose owner was killed.

An owner holds a lock (flock) on its files. The kernel releases it when the owner ends, however it ends, so whoever gets
the lock knows that nobody needs the files. Unlike a process id, a lock means the same in every container.
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

_NAME = re.compile(r"bertqa_\d+_[0-9a-f]{8}")  # the process id is for people


class Claim:
    """Every entry of a directory whose name begins with a name of ours; nobody else removes them while we live."""

    def __init__(self, path: Path, lock: int) -> None:
        """Take over a locked file or directory and its open descriptor."""
        self.path = path
        self._lock = lock

    @classmethod
    def directory(cls) -> "Claim":
        """A new directory for temporary files that only this user can read."""
        while True:
            path = Path(tempfile.gettempdir()) / _new_name()
            path.mkdir(mode=0o700)
            if (lock := _lock(path)) is not None:
                return cls(path, lock)

    @classmethod
    def shared_memory(cls) -> "Claim":
        """A new prefix for names of shared memory, and an empty file of that name."""
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
        """Remove what others have made under the prefix; our own file or directory stays."""
        for path in self.path.parent.glob(f"{self.path.name}?*"):
            with contextlib.suppress(OSError):  # it has just gone, or belongs to another user
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
    """Remove what killed processes of this user have left in shared memory and among temporary files; says what."""
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
    """A descriptor that holds the lock; None if another process does, it is not ours, or it has just gone."""
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
