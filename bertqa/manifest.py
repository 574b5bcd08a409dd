"""Read and write the two small JSON files that describe a model.

``bertqa.json`` is next to a checkpoint's weights and holds the window settings it was trained with (`Settings`).
``manifest.json`` is next to an engine in ``model_repository/<model>/<version>/``, the *bundle*, and records what the
engine was built from and how it was measured (`Manifest`). The service takes the window settings and the null threshold
from the manifest alone. It refuses a bundle whose tokenizer, manifest and engine do not match. `bertqa.repository`
decides which bundle is served.
"""

import hashlib
import json
import reprlib
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from bertqa.targets import SERVED_TARGETS, ServedTarget, TargetName
from bertqa.windows import MAX_QUESTION_TOKENS, MAX_SEQ_LEN, OVERLAP, WindowTokenizer

MODEL_NAME = "bert_qa"
"""Default name of the model in Triton's repository."""
SETTINGS_FILE = "bertqa.json"
MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"
WEIGHTS_FILE = "model.safetensors"
QUESTIONS_FILE = "questions.json"
FORMAT = 2
"""Version of the manifest format."""

_Any = TypeVar("_Any")
_File = TypeVar("_File", bound="_JsonFile")


def rebuild(target: object) -> str:
    """Say how to fix a version of a target whose parts do not match; an unknown target counts as ``cpu``."""
    known = target if isinstance(target, str) and target in SERVED_TARGETS else "cpu"
    return f"build it again with `python -m engine_builder --checkpoint DIR --target {known}`"


class BundleMismatch(ValueError):
    """Parts of a bundle are missing or do not match; the message says how to fix it."""


class OtherFormat(BundleMismatch):
    """The bundle was written by another release of bertqa."""


class _JsonFile:
    """Reads and writes a dataclass as a JSON object with the same field names."""

    @classmethod
    def read(cls: type[_File], path: Path) -> _File:
        """Read the file.

        Raises:
            BundleMismatch: the file is missing or not JSON, or a field is missing or unknown; the message names it.
        """
        return from_json(cls, read_object(path), str(path))

    def write(self, path: Path) -> None:
        """Write the file, replacing an older one."""
        path.write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n")  # type: ignore[call-overload]


def read_object(path: Path) -> dict[str, Any]:
    """Read a file that contains one JSON object.

    Raises:
        BundleMismatch: the file is missing, is not JSON, or contains another kind of value.
    """
    try:
        values = json.loads(path.read_bytes())
        json.dumps(values, ensure_ascii=False).encode()  # rejects lone surrogates, which could not be written back
    except (OSError, ValueError, RecursionError) as error:
        raise BundleMismatch(f"{path}: not readable ({error})") from error
    if not isinstance(values, dict):
        raise BundleMismatch(f"{path}: must be a JSON object")
    return values


def from_json(cls: type[_Any], values: Mapping[str, Any], place: str) -> _Any:
    """Build a dataclass from a JSON object with the same field names; lists become tuples.

    Raises:
        BundleMismatch: a field is missing, unknown or has the wrong type; the message starts with ``place`` and names
            the field.
    """
    kinds = get_type_hints(cls)
    if unknown := sorted(values.keys() - kinds.keys()):
        raise BundleMismatch(f"{place}: unknown field {reprlib.repr(unknown[0])}")
    for name, value in values.items():
        if not _is_a(value, kinds[name]):
            kind = getattr(kinds[name], "__name__", "") if not get_args(kinds[name]) else ""
            raise BundleMismatch(f"{place}: {name} must be {kind or kinds[name]}, not {reprlib.repr(value)}")
    try:
        return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
    except TypeError as error:
        raise BundleMismatch(f"{place}: {error}") from error


def _is_a(value: object, kind: Any) -> bool:
    """Check whether a JSON value has the type of a dataclass field; an integer is a valid float."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is tuple and isinstance(value, list):
        kinds = inner[:1] * len(value) if inner[1:] == (...,) else inner
        return len(kinds) == len(value) and all(map(_is_a, value, kinds))
    if origin is Mapping:
        return isinstance(value, dict) and all(_is_a(each, inner[1]) for each in value.values())
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin in (Union, UnionType):
        return any(_is_a(value, each) for each in inner)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(_JsonFile):
    """The window settings and null threshold of a checkpoint; the defaults apply if it has no ``bertqa.json``."""

    name: str = "bert-qa"
    max_seq_len: int = MAX_SEQ_LEN
    overlap: int = OVERLAP
    max_question_tokens: int = MAX_QUESTION_TOKENS
    null_threshold: float = 0.0  # fitted on held-back questions; half of them have no answer

    @classmethod
    def of_checkpoint(cls, directory: Path) -> "Settings":
        """Read a checkpoint's ``bertqa.json``; without one, use the defaults and the directory's name."""
        path = directory / SETTINGS_FILE
        return cls.read(path) if path.exists() else cls(name=directory.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest(_JsonFile):
    """What an engine is, what it was built from, and what was measured before it was published."""

    name: str  # of the checkpoint
    target: TargetName
    precision: str  # e.g. "bf16", "int8"
    engine_file: str  # in the manifest's directory
    engine_sha256: str  # of all engine files; for OpenVINO the .xml, then the .bin
    tokenizer_sha256: str
    checkpoint_sha256: str  # of model.safetensors
    onnx_sha256: str  # of the graph between checkpoint and engine
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
    runtime: Mapping[str, str]  # library, driver or device -> version, at build time
    built: str  # UTC, ISO 8601
    triton: tuple[str, str]  # lowest and highest Triton version that can run it; "" means no limit
    latency_ms: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # bucket -> "p50", ... per call
    files: Mapping[str, str] = field(default_factory=dict)  # SHA-256 of every other file of the bundle
    cpu_features: tuple[str, ...] = ()  # of the CPU that built it; empty for GPU engines
    buckets: tuple[int, ...]  # window lengths in tokens, as defined by the release that built it
    max_batch_size: int = 1
    format: int = FORMAT

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Read the file.

        Raises:
            OtherFormat: another release wrote the file.
            BundleMismatch: as in `_JsonFile.read`.
        """
        values = read_object(path)
        found = values.get("format", FORMAT)
        if found != FORMAT:  # checked first, because the fields may differ too
            fix = rebuild(values.get("target"))
            raise OtherFormat(f"{path}: manifest format {reprlib.repr(found)}, but this release reads {FORMAT}; {fix}")
        return from_json(cls, values, str(path))

    @property
    def served(self) -> ServedTarget:
        """How Triton runs the engine."""
        return SERVED_TARGETS[self.target]

    @property
    def identity(self) -> str:
        """Unique short name of this engine; the service compares it with the parameter in ``config.pbtxt``."""
        return f"{self.name}-{self.target}-{self.precision}-{self.engine_sha256[:12]}"


@dataclass(frozen=True, slots=True)
class Bundle:
    """A published version: its manifest, and the window tokenizer that its engine was measured with."""

    model: str  # its name in Triton's repository
    version: int
    manifest: Manifest
    tokenizer: WindowTokenizer

    @classmethod
    def open(cls, directory: Path) -> "Bundle":
        """Open ``<model>/<version>`` and check that its tokenizer is the one that the engine was built with.

        This does not hash the engine, because the service may run where only manifest and tokenizer are available;
        `changed_files` does.

        Raises:
            BundleMismatch: a part is missing, or the parts do not match.
        """
        manifest = Manifest.read(directory / MANIFEST_FILE)
        tokenizer, fix = directory / TOKENIZER_FILE, rebuild(manifest.target)
        if not tokenizer.is_file() or sha256_of(tokenizer) != manifest.tokenizer_sha256:
            raise BundleMismatch(f"{tokenizer}: not the tokenizer that the engine was built with; {fix}")
        try:
            window_tokenizer = WindowTokenizer.from_directory(
                directory,
                max_seq_len=manifest.max_seq_len,
                max_question_tokens=manifest.max_question_tokens,
                overlap=manifest.overlap,
                buckets=manifest.buckets,
            )
        except ValueError as error:
            raise BundleMismatch(f"{directory}: {error}; {fix}") from error
        if window_tokenizer.vocabulary_size > manifest.vocabulary_size:
            raise BundleMismatch(
                f"{tokenizer}: {window_tokenizer.vocabulary_size} tokens, but the engine embeds "
                f"{manifest.vocabulary_size}; {fix}"
            )
        return cls(directory.parent.name, int(directory.name), manifest, window_tokenizer)


def changed_files(directory: Path, manifest: Manifest) -> list[str]:
    """Return the names of the bundle's files that are missing, unreadable, or changed since it was published."""
    changed = []
    for name, expected in sorted(manifest.files.items()):
        try:
            right = sha256_of(directory / name) == expected
        except OSError:
            right = False
        if not right:
            changed.append(name)
    return changed


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
