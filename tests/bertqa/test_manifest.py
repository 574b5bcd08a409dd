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
    OtherFormat,
    Settings,
    changed_files,
    sha256_of,
)
from bertqa.targets import TargetName


@pytest.fixture
def directory(bundle: Bundle, tmp_path: Path) -> Path:
    """A bundle of the toy model, without an engine."""
    directory = tmp_path / MODEL_NAME / "2"
    directory.mkdir(parents=True)
    (directory / "tokenizer.json").write_text(bundle.tokenizer.tokenizer_json())
    hashed = sha256_of(directory / "tokenizer.json")
    manifest = dataclasses.replace(bundle.manifest, tokenizer_sha256=hashed, files={"tokenizer.json": hashed})
    manifest.write(directory / MANIFEST_FILE)
    return directory


def test_a_manifest_is_read_as_it_was_written(bundle: Bundle, tmp_path: Path) -> None:
    bundle.manifest.write(tmp_path / "manifest.json")
    assert Manifest.read(tmp_path / "manifest.json") == bundle.manifest


def test_a_bundle_is_opened_as_it_was_measured(directory: Path, bundle: Bundle) -> None:
    opened = Bundle.open(directory)
    assert (opened.model, opened.version) == (MODEL_NAME, 2)
    assert opened.tokenizer.overlap == bundle.manifest.overlap
    assert opened.tokenizer.buckets == bundle.manifest.buckets


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_a_changed_tokenizer_is_refused(directory: Path, target: TargetName) -> None:
    manifest = Manifest.read(directory / MANIFEST_FILE)
    dataclasses.replace(manifest, target=target).write(directory / MANIFEST_FILE)
    path = directory / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    words = r"tokenizer\.json: not the tokenizer that the engine was built with; build it again with .* --target "
    with pytest.raises(BundleMismatch, match=f"{words}{target}`$"):
        Bundle.open(directory)


def test_a_tokenizer_with_more_tokens_than_the_engine_is_refused(directory: Path) -> None:
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_tokens(["brandnewtoken"])
    tokenizer.save(str(directory / "tokenizer.json"))
    manifest = Manifest.read(directory / MANIFEST_FILE)
    hashed = sha256_of(directory / "tokenizer.json")
    dataclasses.replace(manifest, tokenizer_sha256=hashed).write(directory / MANIFEST_FILE)
    with pytest.raises(BundleMismatch, match=f"but the engine embeds {manifest.vocabulary_size}"):
        Bundle.open(directory)


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


@pytest.mark.parametrize("found", [1, 99])
def test_another_manifest_format_is_refused_whatever_its_fields(directory: Path, found: int) -> None:
    path = directory / MANIFEST_FILE
    for target, named in (("tensorrt", "tensorrt"), ("cpu", "cpu"), (["?"], "cpu")):
        path.write_text(json.dumps({"format": found, "a_field_of_its_own": True, "target": target}))
        with pytest.raises(
            OtherFormat,
            match=f"manifest format {found}, but this release reads 2; build it again with .python .*--target {named}`",
        ):
            Bundle.open(directory)


def test_changed_and_missing_files_are_named(directory: Path) -> None:
    manifest = Manifest.read(directory / MANIFEST_FILE)
    assert changed_files(directory, manifest) == []
    more = dataclasses.replace(manifest, files={**manifest.files, "engine.bin": "0" * 64})
    assert changed_files(directory, more) == ["engine.bin"]
    with (directory / "tokenizer.json").open("r+b") as file:
        file.write(b"[")
    assert changed_files(directory, manifest) == ["tokenizer.json"]


def test_a_checkpoint_without_settings_takes_the_defaults(tmp_path: Path) -> None:
    directory = tmp_path / "my-bert"
    directory.mkdir()
    assert Settings.of_checkpoint(directory) == Settings(name="my-bert")
    Settings(name="other", overlap=7, null_threshold=-1.5).write(directory / "bertqa.json")
    assert Settings.of_checkpoint(directory) == Settings(name="other", overlap=7, null_threshold=-1.5)
