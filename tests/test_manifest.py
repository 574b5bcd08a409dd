import dataclasses
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from bertqa.manifest import (
    MANIFEST_FILE,
    MODEL_NAME,
    Bundle,
    BundleMismatch,
    Manifest,
    Settings,
    open_bundle,
    sha256_of,
)


@pytest.fixture
def repository(bundle: Bundle, tmp_path: Path) -> Path:
    """A repository with versions 1 and 2 of the toy model, without engines."""
    for version in ("1", "2"):
        directory = tmp_path / MODEL_NAME / version
        directory.mkdir(parents=True)
        (directory / "tokenizer.json").write_text(bundle.maker.tokenizer_json())
        hashed = sha256_of(directory / "tokenizer.json")
        dataclasses.replace(bundle.manifest, tokenizer_sha256=hashed).write(directory / MANIFEST_FILE)
    return tmp_path


def test_a_manifest_is_read_as_it_was_written(bundle: Bundle, tmp_path: Path) -> None:
    bundle.manifest.write(tmp_path / "manifest.json")
    assert Manifest.read(tmp_path / "manifest.json") == bundle.manifest


def test_the_latest_version_is_opened_or_the_one_asked_for(repository: Path, bundle: Bundle) -> None:
    assert open_bundle(repository).version == 2
    opened = open_bundle(repository, 1)
    assert opened.version == 1
    assert opened.maker.overlap == bundle.manifest.overlap
    assert opened.maker.buckets == bundle.manifest.buckets


def test_an_empty_repository_names_the_builder(tmp_path: Path) -> None:
    with pytest.raises(BundleMismatch, match="python -m engine_builder"):
        open_bundle(tmp_path)


def test_a_changed_tokenizer_is_refused(repository: Path) -> None:
    path = repository / MODEL_NAME / "2" / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(BundleMismatch, match=r"tokenizer\.json: not the tokenizer that the engine was built with"):
        open_bundle(repository)


def test_a_tokenizer_with_more_tokens_than_the_engine_is_refused(repository: Path) -> None:
    directory = repository / MODEL_NAME / "2"
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_tokens(["brandnewtoken"])
    tokenizer.save(str(directory / "tokenizer.json"))
    manifest = Manifest.read(directory / MANIFEST_FILE)
    hashed = sha256_of(directory / "tokenizer.json")
    dataclasses.replace(manifest, tokenizer_sha256=hashed).write(directory / MANIFEST_FILE)
    with pytest.raises(BundleMismatch, match=f"but the engine embeds {manifest.vocabulary_size}"):
        open_bundle(repository)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable"),
        ("[]", "must be a JSON object"),
        ('{"name": "x"}', "missing .* required keyword-only arguments: 'target'"),
        ('{"nmae": "x"}', "unknown field 'nmae'"),
    ],
)
def test_a_broken_manifest_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(BundleMismatch, match=message) as caught:
        Manifest.read(tmp_path / "manifest.json")
    assert "manifest.json" in str(caught.value)


def test_another_manifest_format_is_refused(repository: Path) -> None:
    path = repository / MODEL_NAME / "2" / MANIFEST_FILE
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"format": 99}))
    with pytest.raises(BundleMismatch, match="manifest format 99"):
        open_bundle(repository)


def test_a_checkpoint_without_settings_takes_the_defaults(tmp_path: Path) -> None:
    directory = tmp_path / "my-bert"
    directory.mkdir()
    assert Settings.of_checkpoint(directory) == Settings(name="my-bert")
    Settings(name="other", overlap=7, null_threshold=-1.5).write(directory / "bertqa.json")
    assert Settings.of_checkpoint(directory) == Settings(name="other", overlap=7, null_threshold=-1.5)
