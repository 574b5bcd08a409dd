"""Where a build becomes a version: a directory that nobody sees until it is whole, and then its place in the model."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bertqa.manifest import Manifest
from engine_builder.triton_config import triton_config


class BuildRefused(Exception):
    """The arguments or the state of the repository do not allow the build; the message names the flag."""


@contextmanager
def building(model: Path) -> Iterator[Path]:
    """A directory on the repository's own file system, gone in the end unless it was renamed."""
    created = [parent for parent in (model, *model.parents) if not parent.exists()]
    model.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix=".building-", dir=model))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        for parent in created:  # innermost first
            if not any(parent.iterdir()):
                parent.rmdir()


def publish(directory: Path, manifest: Manifest, version: int | None, *, instances: int, threads: int) -> Path:
    """Rename a built directory to a version beside it, then write ``config.pbtxt``, which makes it servable.

    The version before stays on disk; older ones are removed.

    Raises:
        BuildRefused: the version exists, or a later one does, which Triton would go on serving.
    """
    model = directory.parent
    versions = sorted(int(entry.name) for entry in model.iterdir() if entry.name.isdecimal())
    latest = versions[-1] if versions else 0
    if version is None:
        version = latest + 1
    elif version <= latest:
        raise BuildRefused(f"--version {version}: {model} already has version {latest}, and Triton serves the highest")
    target = model / str(version)
    directory.chmod(0o755)  # a temporary directory is private, and Triton may run as another user
    directory.rename(target)
    config = model / ".config.pbtxt"
    config.write_text(triton_config(manifest, instances=instances, threads=threads))
    config.replace(model / "config.pbtxt")
    for old in versions[:-1]:
        shutil.rmtree(model / str(old))
    return target
