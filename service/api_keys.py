"""API keys, stored as hashes in a file; each has a name and a rate limit.

A line of the file is ``NAME SHA256 RATE BURST [UNIT]``: the hash of the key in hexadecimal, the number per second and
the number at once; ``- -`` means no limit. UNIT is what the rate counts: ``request`` (the default), ``question``, or
``window``, which is one engine call. ``#`` starts a comment. An empty file is treated as a file being written: the
previous keys stay valid. Keys are 256 random bits, so nobody can find one from its SHA-256. A slow hash, made for
passwords, would only slow down requests.
"""

import asyncio
import fcntl
import hashlib
import hmac
import io
import logging
import math
import os
import re
import secrets
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

PREFIX = "bertqa_"
"""Prefix of every key, so that scanners can recognize leaked keys."""
FOLLOW_S = 1.0
"""Seconds between two checks of the file."""

Unit = Literal["request", "question", "window"]
"""What a key's rate counts."""

log = logging.getLogger("bertqa.service")

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


class KeysError(ValueError):
    """The key file is unusable; the message names the file and the line."""


@dataclass(slots=True)
class Key:
    """Name and limits of a key, and its token bucket; not the key itself."""

    name: str
    sha256: bytes
    rate: float = math.inf  # units per second
    burst: float = math.inf  # units at once after a pause
    unit: Unit = "request"
    _tokens: float = field(init=False)
    _filled: float = field(init=False)

    def __post_init__(self) -> None:
        self._tokens, self._filled = self.burst, time.monotonic()

    @property
    def limits(self) -> tuple[float, float, Unit]:
        """Rate, burst and unit."""
        return self.rate, self.burst, self.unit

    def charge(self, unit: Unit, number: int) -> None:
        """Spend the units of a request beyond the one that `take` spent; the balance may become negative."""
        if unit == self.unit:
            self._tokens -= max(number, 0)

    def take(self) -> float:
        """Spend one unit and return 0.0, or return the seconds until one is available."""
        if math.isinf(self.rate):
            return 0.0
        now = time.monotonic()
        self._tokens = min(self.burst, self._tokens + (now - self._filled) * self.rate)
        self._filled = now
        if self._tokens >= 1:
            self._tokens -= 1
            return 0.0
        return (1 - self._tokens) / self.rate


def parse_keys(path: Path) -> dict[str, Key]:
    """Read a key file; returns the keys by name.

    Raises:
        KeysError: it cannot be read, or a line is invalid.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise KeysError(f"{path}: cannot be read ({error})") from None
    keys: dict[str, Key] = {}
    for number, line in enumerate(lines, 1):
        parts = line.partition("#")[0].split()
        if not parts:
            continue
        try:
            name, sha256, rate, burst, *rest = parts
            key = Key(name, bytes.fromhex(sha256), *_limits(rate, burst), *_unit(rest))
        except ValueError as error:
            raise KeysError(f"{path}, line {number}: must be NAME SHA256 RATE BURST [UNIT] ({error})") from None
        if not _NAME.fullmatch(name) or len(key.sha256) != 32:
            raise KeysError(f"{path}, line {number}: must begin with a name and 64 hexadecimal digits")
        if name in keys or any(key.sha256 == other.sha256 for other in keys.values()):
            raise KeysError(f"{path}, line {number}: the name or key is a duplicate")
        keys[name] = key
    return keys


def _limits(rate: str, burst: str) -> tuple[float, float]:
    if rate == burst == "-":
        return math.inf, math.inf
    try:
        limits = float(rate), float(burst)
    except ValueError:  # its message quotes the value, which may be a key
        limits = math.nan, math.nan
    if not (0 < limits[0] < math.inf and 1 <= limits[1] < math.inf):
        raise ValueError("RATE must be above 0, BURST at least 1, or both -")
    return limits


def _unit(rest: Sequence[str]) -> tuple[Unit, ...]:
    match rest:
        case []:
            return ()
        case ["request" | "question" | "window" as unit]:
            return (unit,)
        case _:  # may contain a key, so do not quote it
            raise ValueError(f"UNIT must be one of {', '.join(get_args(Unit))}, with nothing after it")


class Keyring:
    """The keys of a file, reloaded when it changes."""

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises:
            KeysError: as in `parse_keys`.
        """
        self._path = path
        self._stamp = self._look()
        self._keys = parse_keys(path)

    def find(self, presented: bytes) -> Key | None:
        """Return the key that was presented, or None; compares with every key in constant time."""
        sha256 = hashlib.sha256(presented).digest()
        found = None
        for key in self._keys.values():
            if hmac.compare_digest(key.sha256, sha256):
                found = key
        return found

    def reload(self) -> None:
        """Read the file if it has changed; if it is unusable, log this once and keep the previous keys.

        An editor that truncates a file before it writes leaves it empty for a moment. To make no key valid, leave a
        comment in the file.
        """
        stamp = self._look()
        if stamp == self._stamp:
            return
        try:
            keys = parse_keys(self._path)
            if not stamp or stamp[-1] == 0:
                raise KeysError(f"{self._path}: is empty, as if it were being written")
        except KeysError as error:
            self._stamp = stamp
            log.error("%s; the previous keys stay valid", error)
            return
        for name, key in keys.items():
            old = self._keys.get(name)
            if old and (old.sha256, old.limits) == (key.sha256, key.limits):
                keys[name] = old  # keeps its balance
        self._stamp, self._keys = stamp, keys
        log.warning("%s: %d keys loaded", self._path, len(keys))

    async def follow(self) -> None:
        """Reload the file when it changes, until cancelled; in its own thread, as others may be busy."""
        loop, thread = asyncio.get_running_loop(), ThreadPoolExecutor(1, "keys")
        try:
            while True:
                await asyncio.sleep(FOLLOW_S)
                try:
                    await loop.run_in_executor(thread, self.reload)
                except Exception:  # the next check may succeed
                    log.exception("%s could not be checked; trying again", self._path)
        finally:
            thread.shutdown(wait=False, cancel_futures=True)

    def _look(self) -> tuple[int, ...]:
        try:
            found = self._path.stat()
        except OSError:
            return ()
        return found.st_mtime_ns, found.st_ino, found.st_size


def new_key(path: Path, name: str, rate: float | None, burst: float | None, unit: Unit = "request") -> str:
    """Make a key and append its hash to the file.

    Returns:
        The key; it is stored nowhere.

    Raises:
        KeysError: the name or a limit is invalid, the name is taken, or the file is unusable.
    """
    keys = parse_keys(path) if path.exists() else {}
    if not _NAME.fullmatch(name):
        raise KeysError(f"NAME: must be up to 64 letters, digits, dots, dashes and underscores; got {name!r:.80}")
    if name in keys:
        raise KeysError(f"{path}: already has a key {name}; choose another name, or revoke that key")
    key = PREFIX + secrets.token_urlsafe(32)
    limits = "- -" if rate is None else f"{rate:g} {burst or max(2 * rate, 1):g}"
    try:
        _limits(*limits.split())
    except ValueError as error:
        raise KeysError(f"--rate, --burst: {error}") from None
    counted = "" if rate is None or unit == "request" else f" {unit}"
    line = f"{name} {hashlib.sha256(key.encode()).hexdigest()} {limits}{counted}\n"
    try:
        with _locked(path) as file:
            end = file.seek(0, os.SEEK_END)
            if end and (file.seek(end - 1), file.read(1))[1] != b"\n":
                line = "\n" + line
            file.write(line.encode())  # in one call, so that no reader sees half a line
    except OSError as error:
        raise KeysError(f"{path}: cannot be written ({error.strerror})") from None
    return key


def revoke_key(path: Path, name: str) -> None:
    """Remove a key from the file; other lines stay as they are, and no reader sees half a file.

    Raises:
        KeysError: there is no such key, or the file is unusable.
    """
    if name not in parse_keys(path):
        raise KeysError(f"{path}: has no key {name!r:.80}; `bertqa keys list` shows its keys")
    try:
        path = path.resolve()  # keeps a symbolic link
        with _locked(path) as file:
            lines = file.readall().decode("utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.partition("#")[0].split()[:1] != [name]]
            descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            try:
                with open(descriptor, "wb") as new:
                    new.write("".join(kept).encode())
                    new.flush()
                    os.fsync(descriptor)
                found = path.stat()
                if (found.st_uid, found.st_gid) != (os.geteuid(), os.getegid()):
                    os.chown(partial, found.st_uid, found.st_gid)
                os.chmod(partial, stat.S_IMODE(found.st_mode))
                os.replace(partial, path)
            except BaseException:
                os.unlink(partial)
                raise
    except OSError as error:
        raise KeysError(f"{path}: cannot be written ({error.strerror})") from None


@contextmanager
def _locked(path: Path) -> Iterator[io.FileIO]:
    """Open the file for appending, creating it if needed, with a lock against our other processes."""
    while True:
        with open(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600), "r+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            ours, there = os.fstat(file.fileno()), os.stat(path)
            if (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino):  # not replaced in the meantime
                yield file
                return
