"""The two small JSON files that tie a model's parts together.

``bertqa.json`` lies beside a checkpoint's weights: how it was trained to be asked (`Settings`). ``manifest.json`` lies
beside an engine in ``model_repository/bert_qa/<version>/``: what the engine was built from and measured at
(`Manifest`). The service reads nothing else to learn how to make windows and where the null threshold lies, and
refuses to start where tokenizer, manifest and engine do not belong together.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, TypeVar

from bertqa.windows import BUCKETS, MAX_QUESTION_TOKENS, MAX_SEQ_LEN, OVERLAP, WindowMaker

MODEL_NAME = "bert_qa"
"""Name of the model in Triton's repository."""
SETTINGS_FILE = "bertqa.json"
MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"
WEIGHTS_FILE = "model.safetensors"
FORMAT = 1
"""Version of the manifest's own layout."""

Target = Literal["cpu", "tensorrt"]
_File = TypeVar("_File", bound="_JsonFile")


class BundleMismatch(ValueError):
    """Parts of a bundle are missing or do not belong together; the message says how to mend it."""


class _JsonFile:
    """Reads and writes a dataclass as a JSON object with the same field names."""

    @classmethod
    def read(cls: type[_File], path: Path) -> _File:
        """Read the file.

        Raises:
            BundleMismatch: it is missing, not JSON, or has a missing or unknown field; the message names it.
        """
        try:
            values = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise BundleMismatch(f"{path}: not readable ({error})") from error
        if not isinstance(values, dict):
            raise BundleMismatch(f"{path}: must be a JSON object")
        known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
        if unknown := sorted(values.keys() - known):
            raise BundleMismatch(f"{path}: unknown field {unknown[0]!r}")
        try:
            return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
        except TypeError as error:
            raise BundleMismatch(f"{path}: {error}") from error

    def write(self, path: Path) -> None:
        """Write the file, replacing an older one."""
        path.write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n")  # type: ignore[call-overload]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(_JsonFile):
    """How a checkpoint wants to be asked. A checkpoint without the file is asked with these defaults."""

    name: str = "bert-qa"
    max_seq_len: int = MAX_SEQ_LEN
    overlap: int = OVERLAP
    max_question_tokens: int = MAX_QUESTION_TOKENS
    null_threshold: float = 0.0  # fitted on held-back questions, of which half have no answer

    @classmethod
    def of_checkpoint(cls, directory: Path) -> "Settings":
        """Read ``bertqa.json`` of a checkpoint, or take the defaults and the directory's name where there is none."""
        path = directory / SETTINGS_FILE
        return cls.read(path) if path.exists() else cls(name=directory.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest(_JsonFile):
    """What an engine is, what it was built from, and what it was measured at before it was published."""

    name: str  # of the checkpoint
    target: Target
    precision: str  # e.g. "bf16", "int8"
    engine_file: str  # beside the manifest
    engine_sha256: str  # of all its files; an OpenVINO engine's are the .xml and then the .bin
    tokenizer_sha256: str
    checkpoint_sha256: str  # of model.safetensors
    vocabulary_size: int
    max_seq_len: int
    overlap: int
    max_question_tokens: int
    null_threshold: float
    exact_match: float  # percent, of this engine on the gate's questions
    f1: float
    reference_f1: float  # of the fp32 checkpoint on the same questions
    gate_questions: int
    gate_data: str  # name and SHA-256 of the questions' file
    runtime: Mapping[str, str]  # library or driver -> version, at build time
    built: str  # UTC, ISO 8601
    buckets: tuple[int, ...] = BUCKETS
    format: int = FORMAT

    @property
    def identity(self) -> str:
        """Short name of exactly this engine; also a parameter in ``config.pbtxt``, where the service compares it."""
        return f"{self.name}-{self.target}-{self.precision}-{self.engine_sha256[:12]}"


@dataclass(frozen=True, slots=True)
class Bundle:
    """A published version: its manifest and the window maker that its engine was measured with."""

    version: int
    manifest: Manifest
    maker: WindowMaker


def open_bundle(repository: Path, version: int | None = None) -> Bundle:
    """Open a version of the model in a Triton repository, the highest one by default, and check that it is whole.

    The engine's own bytes are not hashed here: the service may run where only manifest and tokenizer are at hand.

    Raises:
        BundleMismatch: there is no version, or its tokenizer is not the one that the engine was built with.
    """
    model = repository / MODEL_NAME
    fix = "run `python -m engine_builder --checkpoint DIR --target cpu` to build one"
    if version is None:
        found = [entry for entry in model.glob("[1-9]*") if entry.name.isdecimal()]
        versions = [int(entry.name) for entry in found if (entry / MANIFEST_FILE).is_file()]
        if not versions:
            raise BundleMismatch(f"{model}: holds no built version; {fix}")
        version = max(versions)
    directory = model / str(version)
    manifest = Manifest.read(directory / MANIFEST_FILE)
    if manifest.format != FORMAT:
        raise BundleMismatch(f"{directory}: manifest format {manifest.format}, this release reads {FORMAT}; {fix}")
    tokenizer = directory / TOKENIZER_FILE
    if not tokenizer.is_file() or sha256_of(tokenizer) != manifest.tokenizer_sha256:
        raise BundleMismatch(f"{tokenizer}: not the tokenizer that the engine was built with; {fix}")
    maker = WindowMaker.from_directory(
        directory,
        max_seq_len=manifest.max_seq_len,
        max_question_tokens=manifest.max_question_tokens,
        overlap=manifest.overlap,
        buckets=manifest.buckets,
    )
    if maker.vocabulary_size > manifest.vocabulary_size:
        raise BundleMismatch(
            f"{tokenizer}: {maker.vocabulary_size} tokens, but the engine embeds {manifest.vocabulary_size}; {fix}"
        )
    return Bundle(version, manifest, maker)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
