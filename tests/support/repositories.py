"""Versions of the toy model in a model repository, without an engine."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bertqa.manifest import MANIFEST_FILE, MODEL_NAME, TOKENIZER_FILE, Bundle, sha256_of
from bertqa.repository import Repository


def publish_toy_bundle(
    repository: Repository,
    bundle: Bundle,
    version: int | None = None,
    model: str = MODEL_NAME,
    *,
    files: Mapping[str, str] | None = None,
    **fields: Any,
) -> Path:
    """Write a version of a toy bundle and return its directory; the version is not activated.

    Args:
        repository: repository to write to.
        bundle: source of the tokenizer and the manifest.
        version: version number; None for the bundle's own.
        model: name in the repository.
        files: names and contents of more files in the bundle.
        fields: replacements of manifest fields; all hashes are correct otherwise.
    """
    directory = repository.directory(model, bundle.version if version is None else version)
    directory.mkdir(parents=True)
    for name, text in {TOKENIZER_FILE: bundle.tokenizer.tokenizer_json(), **(files or {})}.items():
        (directory / name).write_text(text)
    hashes = {path.name: sha256_of(path) for path in directory.iterdir()}
    fields = {"tokenizer_sha256": hashes[TOKENIZER_FILE], "files": hashes, **fields}
    dataclasses.replace(bundle.manifest, **fields).write(directory / MANIFEST_FILE)
    return directory
