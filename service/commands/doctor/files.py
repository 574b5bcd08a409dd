"""Check that the service can read the files and the builder can write them."""

import os
from collections.abc import Iterator
from pathlib import Path

from bertqa.repository import LOCK_FILE, Repository
from service.commands.doctor.finding import Finding


def check_files(repository: Repository) -> Iterator[Finding]:
    """Check the permissions of all files and directories; reports only the first problem."""
    subject = f"files in {repository.root}"
    found = [path for path in repository.root.rglob("*") if path.name != LOCK_FILE]
    for path in found:
        if not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
            yield Finding("FAIL", subject, f"{path} cannot be read", f"chmod -R u+rX,go+rX {repository.root}")
            return
    for path in found:
        if not _is_readable_by_all(path):
            yield Finding(
                "WARN",
                subject,
                f"only its owner can read {path}, but a Triton in a container runs as another user",
                f"chmod -R go+rX {repository.root}",
            )
            return
    if not os.access(repository.root, os.W_OK):
        yield Finding("WARN", subject, "readable but not writable: `bertqa models` and the builder cannot work here")
    else:
        yield Finding("ok", subject, "readable by all, and writable")


def _is_readable_by_all(path: Path) -> bool:
    bits = 0o005 if path.is_dir() else 0o004
    return path.stat().st_mode & bits == bits
