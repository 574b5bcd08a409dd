"""What the launcher checks before it starts anything; its processes are in runtime/test_launcher_processes.py."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bertqa.manifest import MODEL_NAME, Bundle, BundleMismatch, sha256_of
from bertqa.repository import Repository
from bertqa.triton_config import Serving
from service.runtime import engine
from service.runtime.engine import LaunchError, ensure_engine, settle
from tests.support.repositories import publish_toy_bundle

Add = Callable[..., Path]


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "model_repository")


@pytest.fixture
def add(bundle: Bundle, repository: Repository) -> Add:
    def add(version: int, **fields: Any) -> Path:
        return publish_toy_bundle(repository, bundle, version, **fields)

    return add


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(b"weights")
    return directory


def test_an_engine_of_the_named_checkpoint_is_taken_up_again(
    repository: Repository, add: Add, checkpoint: Path
) -> None:
    hashed = sha256_of(checkpoint / "model.safetensors")
    add(1)
    add(2, checkpoint_sha256=hashed)
    add(3, checkpoint_sha256=hashed)
    add(4)
    repository.activate(MODEL_NAME, 4, alone=True)
    ensure_engine(repository.root, None, threading.Event())
    assert repository.open().version == 4
    ensure_engine(repository.root, checkpoint, threading.Event())
    assert repository.serving()[MODEL_NAME] == Serving(active=3, previous=4, loaded=(3,))
    repository.load(MODEL_NAME, 2)
    repository.switch(MODEL_NAME, 2)
    ensure_engine(repository.root, checkpoint, threading.Event())
    assert repository.open().version == 2, "the active one has it too"


@pytest.mark.parametrize("present", ["an engine of another checkpoint", "an engine of an earlier release", "nothing"])
def test_otherwise_one_is_built(
    repository: Repository,
    add: Add,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    present: str,
) -> None:
    caplog.set_level("INFO")
    if present != "nothing":
        manifest = add(1) / "manifest.json"
    if present == "an engine of an earlier release":
        manifest.write_text('{"format": 1, "name": "x"}')
    builder = repository.root.parent / "engine_builder"
    builder.mkdir()
    (builder / "__init__.py").touch()
    (builder / "__main__.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(engine, "PROJECT", builder.parent)
    with pytest.raises(LaunchError, match=r"building the engine failed \(exit code 3\)"):
        ensure_engine(repository.root, checkpoint, threading.Event())
    reason = "no engine in" if present == "nothing" else "are from other checkpoints, or from an earlier release"
    assert reason in caplog.text


def test_a_loaded_version_that_is_not_whole_any_more_is_left_out(
    repository: Repository, add: Add, caplog: pytest.LogCaptureFixture
) -> None:
    spoiled = add(1)
    add(2)
    repository.activate(MODEL_NAME, 2)
    repository.load(MODEL_NAME, 1)
    settle(repository)
    assert repository.serving()[MODEL_NAME].loaded == (1, 2)
    (spoiled / "tokenizer.json").write_text("{}")
    settle(repository)
    assert repository.serving()[MODEL_NAME].loaded == (2,)
    assert "bert_qa 1: tokenizer.json has changed since it was published" in caplog.text
    (repository.directory(MODEL_NAME, 2) / "tokenizer.json").write_text("{}")
    with pytest.raises(
        BundleMismatch, match=r"bert_qa 2: tokenizer\.json has changed since it was published; build it again"
    ):
        settle(repository)


def test_a_configuration_that_was_edited_is_written_anew(repository: Repository, add: Add) -> None:
    add(1)
    repository.activate(MODEL_NAME, 1)
    path = repository.root / MODEL_NAME / "config.pbtxt"
    generated = path.read_text()
    path.write_text(generated.replace("count: 2", "count: 1"))
    settle(repository)
    assert path.read_text() == generated
