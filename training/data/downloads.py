"""Download files with resume and checksums; a file gets its final name only when it is complete."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
from tqdm import tqdm

ATTEMPTS = 8
"""Consecutive attempts without progress before a download fails."""
_HEADERS = {
    "User-Agent": "bertqa-training-data/0.1 (python-httpx; python -m training.data)",
    "Accept-Encoding": "identity",  # ranges must count bytes of the file, not of a compressed transfer
}
_BLOCK = 1 << 20


class DownloadError(Exception):
    """A file cannot be downloaded or has the wrong content; the message names it and its address."""


class NotOnServer(DownloadError):
    """The server does not have the file."""


class Checksum(NamedTuple):
    """The expected digest of a file."""

    algorithm: str  # a name that hashlib knows
    digest: str  # hexadecimal

    @classmethod
    def parse(cls, text: str) -> "Checksum":
        """Read ``sha256:0123…``.

        Raises:
            ValueError: the algorithm is unknown, or the digest has the wrong length.
        """
        algorithm, _, digest = text.partition(":")
        if algorithm not in ("sha1", "sha256"):
            raise ValueError(f"{text!r} must begin with sha256: or sha1:")
        digits = 2 * hashlib.new(algorithm).digest_size
        if len(digest) != digits or not set(digest.lower()) <= set("0123456789abcdef"):
            raise ValueError(f"{text!r} must have {digits} hexadecimal digits after {algorithm}:")
        return cls(algorithm, digest.lower())

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.digest}"


@contextmanager
def http_client() -> Iterator[httpx.Client]:
    """Create a client for downloads that follows redirects."""
    with httpx.Client(headers=_HEADERS, follow_redirects=True, timeout=60) as client:
        yield client


def fetch_text(client: httpx.Client, url: str) -> str:
    """Fetch a small file, such as a list of checksums.

    Raises:
        DownloadError: the file cannot be downloaded.
    """
    try:
        return client.get(url).raise_for_status().text
    except httpx.HTTPError as error:
        raise DownloadError(f"{url}: {error}") from error


def download(
    client: httpx.Client,
    url: str,
    path: Path,
    checksum: Checksum | None,
    *,
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """Download a file unless it exists; an interrupted transfer resumes, also in a later run.

    The data goes to ``<path>.partial``, which gets the file's name once its checksum is right. If the source publishes
    no checksum, the digest is written to ``<path>.sha256`` (in sha256sum's format), and an existing file is checked
    against it.

    Args:
        client: see `http_client`.
        url: address of the file.
        path: where to store it.
        checksum: checksum of the whole file; None if none is published.
        wait: sleeps for the given seconds between two attempts.

    Raises:
        NotOnServer: there is no such file.
        DownloadError: the server refuses, the transfer fails repeatedly, or the checksum is wrong.
    """
    recorded = path.with_name(path.name + ".sha256")
    if checksum is None and recorded.exists():
        checksum = Checksum("sha256", recorded.read_text().split()[0])
    if path.exists():
        _check(path, url, checksum, "delete it to download it again")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    failures = 0
    while True:
        before = partial.stat().st_size if partial.exists() else 0
        try:
            if _transfer(client, url, partial):
                break
            problem = "the connection was closed before the end of the file"
        except httpx.HTTPStatusError as error:
            status, reason = error.response.status_code, error.response.reason_phrase
            if status < 500:
                kind = NotOnServer if status in (httpx.codes.NOT_FOUND, httpx.codes.GONE) else DownloadError
                raise kind(f"{url}: {status} {reason}") from error
            problem = str(error)
        except httpx.HTTPError as error:
            problem = str(error) or type(error).__name__
        gained = (partial.stat().st_size if partial.exists() else 0) > before
        failures = 1 if gained else failures + 1
        if failures == ATTEMPTS:
            raise DownloadError(f"{url}: {problem}, {ATTEMPTS} times; the same command goes on from {partial}")
        wait(min(2.0 ** (failures - 1), 60.0))
    try:
        _check(
            partial,
            url,
            checksum,
            "it was deleted; the origin may have a newer file, or the transfer was tampered with",
        )
    except DownloadError:
        partial.unlink()
        _validator_file(partial).unlink(missing_ok=True)
        raise
    if checksum is None:
        recorded.write_text(f"{_digest(partial, 'sha256')}  {path.name}\n")
    os.replace(partial, path)
    _validator_file(partial).unlink(missing_ok=True)


def _transfer(client: httpx.Client, url: str, partial: Path) -> bool:
    """Append the rest of a file to its partial file; return False if the transfer ended early."""
    have = partial.stat().st_size if partial.exists() else 0
    validator = _validator_file(partial)
    headers = {}
    if have and validator.exists():
        # Resume only if the file has not changed; otherwise the server sends all of the new one (RFC 9110, 13.1.5).
        headers = {"Range": f"bytes={have}-", "If-Range": json.loads(validator.read_text())}
    with client.stream("GET", url, headers=headers) as response:
        if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
            if response.headers.get("Content-Range") != f"bytes */{have}":
                partial.unlink()  # longer than the file; start again
                return False
            return True  # an earlier run ended between the last byte and the check
        response.raise_for_status()
        if response.status_code != httpx.codes.PARTIAL_CONTENT:
            have = 0
        etag = response.headers.get("ETag", "")
        tag = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")
        if tag:
            validator.write_text(json.dumps(tag))
        size = response.headers.get("Content-Length")
        total = have + int(size) if size else None
        with (
            partial.open("ab" if have else "wb") as file,
            tqdm(
                total=total, initial=have, unit="B", unit_scale=True, unit_divisor=1024, desc=partial.stem, disable=None
            ) as bar,
        ):
            for (
                block
            ) in response.iter_raw():  # unbuffered: with a chunk size, an interruption would lose a partial chunk
                file.write(block)
                bar.update(len(block))
            file.flush()
            os.fsync(file.fileno())
            return total is None or file.tell() == total


def _validator_file(partial: Path) -> Path:
    """Return the file that stores the ETag or date of the source of a partial file."""
    return partial.with_name(partial.name + ".etag")


def _check(path: Path, url: str, checksum: Checksum | None, remedy: str) -> None:
    if checksum is None:
        return
    if (digest := _digest(path, checksum.algorithm)) != checksum.digest:
        raise DownloadError(f"{path}, from {url}: is {checksum.algorithm}:{digest}, should be {checksum}; {remedy}")


def _digest(path: Path, algorithm: str) -> str:
    digest = hashlib.new(algorithm)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
