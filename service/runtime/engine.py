"""Ensure that the model repository has an engine to serve."""

import contextlib
import logging
import os
import sys
import threading
from pathlib import Path

from bertqa.manifest import MODEL_NAME, WEIGHTS_FILE, BundleMismatch, OtherFormat, changed_files, rebuild, sha256_of
from bertqa.repository import Repository
from service.observability import logging as logs
from service.runtime.child import child
from service.shutdown import DRAIN_S

log = logging.getLogger(logs.LAUNCHER)

PROJECT = Path(__file__).resolve().parent.parent.parent


class LaunchError(RuntimeError):
    """The service cannot start; the message says why and what to do."""


def ensure_engine(root: Path, checkpoint: Path | None, stopping: threading.Event) -> None:
    """Ensure that the active version is an engine of the checkpoint, or of any checkpoint if None.

    Activates an engine that was built before, or builds one for the CPU. Stops the build if `stopping` is set.

    Raises:
        LaunchError: there is no checkpoint to build from, or the build failed.
        BundleMismatch: the version in the repository is incomplete.
    """
    repository = Repository(root)
    models = repository.serving()
    reason = f"no engine in {root} yet"
    if checkpoint is None and models:
        for model in models:
            repository.open(model)
        return
    if MODEL_NAME in models and checkpoint:
        found = _version_of(repository, sha256_of(checkpoint / WEIGHTS_FILE), models[MODEL_NAME].active)
        if found:
            repository.open(MODEL_NAME, found)
            if found != models[MODEL_NAME].active:
                repository.activate(MODEL_NAME, found, alone=True)
            return
        reason = f"the engines in {root} are from other checkpoints, or from an earlier release"
    if checkpoint is None:
        weights = sorted(path.parent for path in PROJECT.glob(f"checkpoints/*/{WEIGHTS_FILE}"))
        if len(weights) != 1:
            raise LaunchError(
                f"{root / MODEL_NAME}: has no built version, and checkpoints/ has {len(weights)} checkpoints; choose "
                "one with --checkpoint DIR"
            )
        checkpoint = weights[0]
    log.info("%s: building one from %s; this happens only once", reason, checkpoint)
    command = [sys.executable, "-m", "engine_builder", "--checkpoint", str(checkpoint.resolve()), "--target", "cpu"]
    command += ["--repository", str(root.resolve())]
    with child(command, os.environ, logs.BUILDER, end_s=DRAIN_S, cwd=PROJECT) as builder:
        while builder.poll() is None and not stopping.wait(0.1):
            pass
    if builder.returncode and not stopping.is_set():
        raise LaunchError(f"building the engine failed (exit code {builder.returncode}); see the output above")
    if not stopping.is_set():
        repository.activate(MODEL_NAME, repository.versions(MODEL_NAME)[-1], alone=True)


def _version_of(repository: Repository, checkpoint_sha256: str, active: int) -> int | None:
    """Return the active version if it was built from the checkpoint, else the latest version that was."""
    for version in (active, *reversed(repository.versions(MODEL_NAME))):
        with contextlib.suppress(OtherFormat):
            if repository.manifest(MODEL_NAME, version).checkpoint_sha256 == checkpoint_sha256:
                return version
    return None


def settle(repository: Repository) -> None:
    """Prepare the repository for Triton, which loads all listed versions of a model or none.

    Drops incomplete versions other than the active one from the list, and rewrites an outdated configuration.

    Raises:
        BundleMismatch: an active version is incomplete.
        ChangeRefused: something must change, but the repository is not writable.
    """
    for model, serving in repository.serving().items():
        for version in serving.loaded:
            try:
                manifest = repository.manifest(model, version)
                if changed := changed_files(repository.directory(model, version), manifest):
                    fix = rebuild(manifest.target)
                    raise BundleMismatch(f"{model} {version}: {changed[0]} has changed since it was published; {fix}")
            except BundleMismatch as error:
                if version == serving.active:
                    raise
                log.warning("%s; continuing without it", error)
                repository.unload(model, version)
        if not repository.is_configured(model):
            repository.configure(model)
