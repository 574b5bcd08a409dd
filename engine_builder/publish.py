"""Publish a build as a model version: write it outside the repository, and move it in when it is complete."""

import errno
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from bertqa.manifest import MANIFEST_FILE, MODEL_NAME, Manifest, OtherFormat, sha256_of
from bertqa.repository import MODEL_NAMES, Repository
from bertqa.squad import Example, Predict, answer_all
from bertqa.windows import WindowTokenizer

NO_CACHE = "__pycache__"
"""A file of this name stops Python from writing its bytecode cache next to ``model.py``. In poll mode Triton would see
the cache as a change and load the version again. Triton's Python stub ignores PYTHONDONTWRITEBYTECODE."""
CHECK_QUESTIONS = 8
"""Number of questions stored in a bundle with its answers, to check it wherever it is loaded."""


class BuildRefused(Exception):
    """The options or the state of the repository do not allow the build; the message names the flag."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """Where and how to publish; the fields are command-line flags."""

    repository: Path = Path("model_repository")
    model: str = MODEL_NAME
    version: int | None = None  # None: one above the latest
    activate: bool = False  # a model's first version is always active
    instances: int | None = None  # here and below, None: keep the value, or the default of `Serving`
    threads: int | None = None
    gpus: tuple[int, ...] | None = None

    def next_version(self) -> int:
        """Return the number of the version to publish.

        Raises:
            BuildRefused: the model name is not valid, or the model already has this version or a later one.
        """
        if not MODEL_NAMES.fullmatch(self.model):
            raise BuildRefused(f"--model {self.model}: use letters, digits and _.- and start with a letter or digit")
        model = self.repository / self.model
        versions = [int(entry.name) for entry in model.glob("[0-9]*") if entry.name.isdecimal()]
        latest = max(versions, default=0)
        if self.version is None:
            return latest + 1
        if self.version <= latest:
            raise BuildRefused(f"--version {self.version}: {model} already has version {latest}; give a higher number")
        return self.version


@contextmanager
def building() -> Iterator[Path]:
    """Create a temporary directory to build a bundle in; it is removed at the end unless it was published.

    It is outside the repository, because a polling Triton would take it for a model or for a change of one.
    """
    with tempfile.TemporaryDirectory(prefix="bertqa-build-") as parent:
        directory = Path(parent) / "bundle"
        directory.mkdir()
        yield directory


def write_questions(path: Path, examples: Sequence[Example], tokenizer: WindowTokenizer, engine: Predict) -> None:
    """Write the questions that the engine is most certain of, with its answers, as a JSON list of objects.

    Rounding on another machine does not change these answers.
    """
    found = [(example, decoded.best) for example, decoded in answer_all(examples, tokenizer, engine)]
    sure = sorted((pair for pair in found if pair[1]), key=lambda pair: -pair[1].score if pair[1] else 0)
    questions = [
        {"question": example.question, "context": example.context, "answer": best.text, "start": best.start}
        for example, best in sure[:CHECK_QUESTIONS]
        if best
    ]
    path.write_text(json.dumps(questions, ensure_ascii=False, indent=1) + "\n")


@dataclass(frozen=True, slots=True)
class Published:
    """A published version."""

    directory: Path
    manifest: Manifest
    active: bool  # it answers from now on


def publish(directory: Path, manifest: Manifest, where: Publication) -> Published:
    """Write the manifest with the hashes of all files, and move a built directory into place as a model version.

    Keeps the active, previous and loaded versions on disk, and removes other older ones.

    Raises:
        BuildRefused: as in `Publication.next_version`.
        ChangeRefused: the repository is not writable.
    """
    repository = Repository(where.repository)
    if manifest.served.backend == "python":
        (directory / NO_CACHE).write_text("See NO_CACHE of engine_builder/publish.py.\n")
    hashes = {path.name: sha256_of(path) for path in sorted(directory.iterdir()) if path.name != MANIFEST_FILE}
    manifest = replace(manifest, files=hashes)
    manifest.write(directory / MANIFEST_FILE)
    directory.chmod(0o755)  # a temporary directory is private, and Triton may run as another user
    for path in directory.iterdir():
        path.chmod(0o644)
    if answering := _answers(repository, where.model):
        repository.configure(where.model)  # records the active version, so that a higher number alone changes nothing
    with repository.locked():
        version = where.next_version()
        serving = repository.serving().get(where.model) if answering else None
        target = repository.directory(where.model, version)
        target.parent.mkdir(exist_ok=True)
        _move(directory, target)
        keep = {version, serving.active, serving.previous, *serving.loaded} if serving else {version}
        for old in repository.versions(where.model):
            if old < version and old not in keep:
                shutil.rmtree(repository.directory(where.model, old))
    options = {"instances": where.instances, "threads": where.threads, "gpus": where.gpus}
    if where.activate or not answering:
        repository.activate(where.model, version, alone=not answering, **options)
    else:
        repository.configure(where.model, **options)
    return Published(target, manifest, where.activate or not answering)


def _answers(repository: Repository, model: str) -> bool:
    """Check whether the model has an active version that this release can serve."""
    serving = repository.serving().get(model)
    try:
        return serving is not None and bool(repository.manifest(model, serving.active))
    except OtherFormat:
        return False


def _move(source: Path, target: Path) -> None:
    """Move a directory, or copy it to another file system with the manifest last: without one it is not a version."""
    try:
        source.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(MANIFEST_FILE))
        shutil.copy(source / MANIFEST_FILE, partial := target / f".{MANIFEST_FILE}")
        partial.rename(target / MANIFEST_FILE)
