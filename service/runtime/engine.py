"""See to it that the model repository holds an engine that can be served."""

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
    """The service cannot be started; the message says why and what to do."""


def ensure_engine(root: Path, checkpoint: Path | None, stopping: threading.Event) -> None:
    """See to it that the repository holds an engine of the checkpoint, or any if none is named, and that it answers.

    One that was built before is taken up again; else one is built for the CPU. Ends the build if `stopping` is set.

    Raises:
        LaunchError: there is no checkpoint to build from, or the builder failed.
        BundleMismatch: the version in the repository is not whole.
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
        reason = f"the engines in {root} are of other checkpoints, or of an earlier release"
    if checkpoint is None:
        weights = sorted(path.parent for path in PROJECT.glob(f"checkpoints/*/{WEIGHTS_FILE}"))
        if len(weights) != 1:
            raise LaunchError(
                f"{root / MODEL_NAME}: holds no built version, and checkpoints/ holds {len(weights)} checkpoints "
                "to build one from; name one with --checkpoint DIR"
            )
        checkpoint = weights[0]
    log.info("%s: building one from %s, once", reason, checkpoint)
    command = [sys.executable, "-m", "engine_builder", "--checkpoint", str(checkpoint.resolve()), "--target", "cpu"]
    command += ["--repository", str(root.resolve())]
    with child(command, os.environ, logs.BUILDER, end_s=DRAIN_S, cwd=PROJECT) as builder:
        while builder.poll() is None and not stopping.wait(0.1):
            pass
    if builder.returncode and not stopping.is_set():
        raise LaunchError(f"the engine could not be built (exit code {builder.returncode}); its output is above")
    if not stopping.is_set():
        repository.activate(MODEL_NAME, repository.versions(MODEL_NAME)[-1], alone=True)


def _version_of(repository: Repository, checkpoint_sha256: str, active: int) -> int | None:
    """The active version if it was built from the checkpoint, else the latest one that was."""
    for version in (active, *reversed(repository.versions(MODEL_NAME))):
        with contextlib.suppress(OtherFormat):
            if repository.manifest(MODEL_NAME, version).checkpoint_sha256 == checkpoint_sha256:
                return version
    return None


def settle(repository: Repository) -> None:
    """Make the repository fit for a Triton that is about to start: it would load all versions of a model or none.

    What is loaded beside the active version and is not whole any more is left out; a configuration that was not
    generated from what is there now is written anew.

    Raises:
        BundleMismatch: an active version is not whole.
        ChangeRefused: something must change, and the repository cannot be written to.
    """
    for model, serving in repository.serving().items():
        for version in serving.loaded:
            try:
                manifest = repository.manifest(model, version)
                if changed := changed_files(repository.directory(model, version), manifest):
                    fix = rebuild(manifest.target)
                    raise BundleMismatch(f"{model} {version}: {changed[0]} is not as it was published; {fix}")
            except BundleMismatch as error:
                if version == serving.active:
                    raise
                log.warning("%s; going on without it", error)
                repository.unload(model, version)
        if not repository.is_configured(model):
            repository.configure(model)
