"""Shard sets: tokenized sentence pairs on disk, and the manifest that says what they were made with.

A set is a directory of shards, ``part-00000.parquet`` and so on (or ``.tfrecord``, of ``tf.Example`` messages), with
the tokenizer they were made with and ``manifest.json``. A row is one sequence, ``[CLS] A [SEP] B [SEP]``, without
padding and without masks: what is masked is drawn when it is read, see `training.masked_lm`. `training.data` writes
sets.
"""

import hashlib
import json
import os
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from bertqa.manifest import TOKENIZER_FILE, BundleMismatch, from_json, read_object, sha256_of
from training.tfrecords import CorruptRecord, read_examples, write_examples

Storage = Literal["parquet", "tfrecord"]

FORMAT = 1
"""Version of the manifest format."""
MANIFEST_FILE = "manifest.json"
GROUP_ROWS = 4096
"""Rows of a Parquet row group, the unit in which rows are read."""
CACHED_GROUPS = 96
"""Number of cached row groups, of about 1 MB each at 128 tokens; a pool of 64 batches of 4096 needs 66."""
_PADDED_VOCABULARY = 128
"""A model's vocabulary may be padded up to the next multiple of this; 8 and 64 are usual."""


class ShardError(ValueError):
    """A shard set is missing, incomplete, corrupt or truncated; the message names the file."""


class ShardMismatch(ValueError):
    """A shard set does not fit the model or the flags; the message names both values."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One stored sequence, ``[CLS] A [SEP] B [SEP]``."""

    input_ids: NDArray[np.int32]  # (tokens,)
    word_starts: NDArray[np.bool_]  # (tokens,), whether a token begins a word; true of [CLS] and [SEP] too
    second: int  # position of the first token of B
    is_random_next: bool  # B is from another document and does not follow A


@dataclass(frozen=True, slots=True)
class Shard:
    """A manifest's entry of one shard."""

    file: str
    rows: int
    tokens: int
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Source:
    """A manifest's entry of one file of documents."""

    file: str  # with the name of its folder
    documents: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardManifest:
    """The sources and settings of a shard set; equal manifests mean equal bytes."""

    storage: Storage
    tokenizer_sha256: str  # see `tokenizer_sha256`
    vocab_size: int  # one more than the highest token id
    special_tokens: Mapping[str, int]  # "[MASK]" -> 103
    max_seq_len: int  # tokens of the longest sequence, special tokens included
    max_predictions_per_seq: int  # most masked tokens of a sequence
    short_seq_prob: float
    duplicates: int
    language: str
    seed: int
    shard_bytes: int
    sources: tuple[Source, ...]
    shards: tuple[Shard, ...] = ()
    format: int = FORMAT

    @classmethod
    def read(cls, path: Path) -> "ShardManifest":
        """Read a ``manifest.json``.

        Raises:
            ShardError: the file is missing, not JSON or of another format, or a field is missing or unknown.
        """
        if not path.exists():
            raise ShardError(
                f"{path.parent}: no complete shard set, {path.name} is missing; `python -m training.data shard` "
                "makes one, and goes on with one that it was making"
            )
        try:
            values = read_object(path)
        except BundleMismatch as error:
            raise ShardError(str(error)) from error
        found = values.get("format")
        if found != FORMAT:
            raise ShardError(f"{path}: format {reprlib.repr(found)}, this release reads {FORMAT}; make the set again")
        try:
            for name, kind in (("sources", Source), ("shards", Shard)):
                if not isinstance(values[name], list):
                    raise ShardError(f"{path}: {name} must be a list")
                listed = [
                    from_json(kind, each, f"{path}: {name}[{n}]") if isinstance(each, dict) else each
                    for n, each in enumerate(values[name])
                ]
                values[name] = listed
            made = from_json(cls, values, str(path))
        except (KeyError, TypeError, BundleMismatch) as error:
            raise ShardError(f"{path}: {error}".replace(f"{path}: {path}: ", f"{path}: ")) from error
        if any(min(shard.rows, shard.tokens, shard.bytes) < 1 for shard in made.shards):
            raise ShardError(f"{path}: shards: rows, tokens and bytes must be at least 1")
        return made

    def write(self, path: Path) -> None:
        """Write the file atomically."""
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")
        os.replace(partial, path)

    def settings(self) -> dict[str, object]:
        """Return all fields that decide the shards' bytes, without the shards themselves."""
        return {name: value for name, value in asdict(replace(self, shards=())).items() if name != "shards"}

    @property
    def rows(self) -> int:
        """Number of sequences in all shards."""
        return sum(shard.rows for shard in self.shards)


def tokenizer_sha256(text: str) -> str:
    """Return the SHA-256 of how a ``tokenizer.json`` tokenizes: vocabulary, normalization and splitting.

    Layout, truncation, padding and the template of special tokens are excluded, because saving a tokenizer again may
    change them without changing the tokens of a text.
    """
    described = json.loads(text)
    essence = {part: described.get(part) for part in ("normalizer", "pre_tokenizer", "model")}
    essence["added_tokens"] = [(token["id"], token["content"]) for token in described.get("added_tokens", [])]
    return hashlib.sha256(json.dumps(essence, sort_keys=True).encode()).hexdigest()


def write_shard(path: Path, pairs: Sequence[Pair], storage: Storage, vocab_size: int) -> Shard:
    """Write one shard atomically and return its manifest entry; the same pairs give the same bytes."""
    partial = path.with_name(f".{path.name}.partial")
    if storage == "parquet":
        pq.write_table(
            _table(pairs, vocab_size), partial, row_group_size=GROUP_ROWS, compression="zstd", write_statistics=False
        )
    else:
        write_examples(
            partial,
            (
                {
                    "input_ids": pair.input_ids.tolist(),
                    "word_starts": pair.word_starts.astype(np.int64).tolist(),
                    "second": [pair.second],
                    "is_random_next": [int(pair.is_random_next)],
                }
                for pair in pairs
            ),
        )
    shard = Shard(
        file=path.name,
        rows=len(pairs),
        tokens=sum(len(pair.input_ids) for pair in pairs),
        bytes=partial.stat().st_size,
        sha256=sha256_of(partial),
    )
    os.replace(partial, path)
    return shard


def check_shard(directory: Path, shard: Shard, *, hashed: bool = True) -> None:
    """Check a shard against its manifest entry: its size and, unless ``hashed`` is False, its SHA-256.

    Raises:
        ShardError: the shard is missing, truncated or corrupt.
    """
    path = directory / shard.file
    again = "run `python -m training.data shard` again as before, it makes this shard anew and keeps the others"
    if not path.is_file():
        raise ShardError(f"{path}: is missing; {again}")
    if (size := path.stat().st_size) != shard.bytes:
        kind = "truncated" if size < shard.bytes else "changed"
        raise ShardError(f"{path}: {kind}, {size} bytes where {MANIFEST_FILE} has {shard.bytes}; {again}")
    if hashed and (digest := sha256_of(path)) != shard.sha256:
        raise ShardError(
            f"{path}: corrupt, SHA-256 {digest[:12]}… where {MANIFEST_FILE} has {shard.sha256[:12]}…; {again}"
        )


class ShardSet:
    """A shard set, open for reading rows by number.

    Rows are read in groups of `GROUP_ROWS`; the `CACHED_GROUPS` last used groups are cached. So reading is fast if
    neighbouring rows are read at about the same time: see ``block`` of `training.batches.Batches`.
    """

    def __init__(self, directory: Path, manifest: ShardManifest) -> None:
        """Use `open`, which checks the files first."""
        self.directory = directory
        self.manifest = manifest
        self._group = lru_cache(CACHED_GROUPS)(self._read_group)
        rows = [shard.rows for shard in manifest.shards]
        self._firsts = np.cumsum([0, *rows[:-1]])  # (shards,), number of each shard's first row
        lengths = [self._read_lengths(number) for number in range(len(rows))]
        self.lengths: NDArray[np.int32] = np.concatenate(lengths)  # (rows,), tokens of each sequence

    @classmethod
    def open(cls, directory: Path, *, hashed: bool = True) -> "ShardSet":
        """Open a set and check that it is complete.

        Args:
            directory: directory of the set.
            hashed: check each file's SHA-256, which takes about a second per gigabyte; otherwise only its size.

        Raises:
            ShardError: the manifest or a file is missing, truncated or corrupt; the message names it.
        """
        manifest = ShardManifest.read(directory / MANIFEST_FILE)
        if not manifest.shards:
            raise ShardError(f"{directory / MANIFEST_FILE}: lists no shard")
        tokenizer = directory / TOKENIZER_FILE
        try:
            digest = tokenizer_sha256(tokenizer.read_text())
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise ShardError(f"{tokenizer}: not a readable tokenizer ({error!r})") from error
        if digest != manifest.tokenizer_sha256:
            raise ShardError(f"{tokenizer}: not the tokenizer that the shards were made with")
        for shard in manifest.shards:
            check_shard(directory, shard, hashed=hashed)
        return cls(directory, manifest)

    def check_model(
        self,
        *,
        vocab_size: int,
        max_position_embeddings: int,
        type_vocab_size: int = 2,
        tokenizer: str | None = None,
        max_seq_len: int | None = None,
        max_predictions_per_seq: int | None = None,
    ) -> None:
        """Refuse a model or flags that the set was not made for, before the first step.

        Args:
            vocab_size: the model's vocabulary size; may be padded to a multiple of 8, 64 or 128.
            max_position_embeddings: number of positions of the model.
            type_vocab_size: number of token types of the model.
            tokenizer: text of the model's own ``tokenizer.json``, if it has one.
            max_seq_len: value of the flag, if given.
            max_predictions_per_seq: value of the flag, if given.

        Raises:
            ShardMismatch: the message names both values.
        """
        made = self.manifest
        where = f"{self.directory}: the shards were made with"
        if not made.vocab_size <= vocab_size <= -(-made.vocab_size // _PADDED_VOCABULARY) * _PADDED_VOCABULARY:
            raise ShardMismatch(
                f"{where} a vocabulary of {made.vocab_size} tokens, the model's vocab_size is {vocab_size}"
            )
        if tokenizer is not None and (digest := tokenizer_sha256(tokenizer)) != made.tokenizer_sha256:
            raise ShardMismatch(
                f"{where} the tokenizer {made.tokenizer_sha256[:12]}…, the model's {TOKENIZER_FILE} is {digest[:12]}…"
            )
        if made.max_seq_len > max_position_embeddings:
            raise ShardMismatch(
                f"{where} --max-seq-len {made.max_seq_len}, the model's max_position_embeddings is "
                f"{max_position_embeddings}"
            )
        if type_vocab_size < 2:
            raise ShardMismatch(f"{where} two segments, the model's type_vocab_size is {type_vocab_size}")
        for flag, value, stored in (
            ("--max-seq-len", max_seq_len, made.max_seq_len),
            ("--max-predictions-per-seq", max_predictions_per_seq, made.max_predictions_per_seq),
        ):
            if value is not None and value != stored:
                raise ShardMismatch(f"{where} {flag} {stored}, this run has {flag} {value}")

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> Pair:
        """Return the sequence of a row; its arrays are shared and must not be modified.

        Raises:
            ShardError: the shard cannot be read any more.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        shard = int(np.searchsorted(self._firsts, row, side="right")) - 1
        local = row - int(self._firsts[shard])
        if self.manifest.storage == "parquet":
            return self._group(shard, local // GROUP_ROWS).pair(local % GROUP_ROWS)
        return self._group(shard, 0).pair(local)

    def _read_group(self, shard: int, group: int) -> "_Rows":
        path = self.directory / self.manifest.shards[shard].file
        try:
            if self.manifest.storage == "tfrecord":
                return _Rows.of_examples(read_examples(path))
            with pq.ParquetFile(path) as file:
                return _Rows.of_table(file.read_row_group(group))
        except (OSError, KeyError, ValueError, CorruptRecord, pa.ArrowException) as error:
            raise ShardError(f"{path}: cannot be read ({error})") from error

    def _read_lengths(self, shard: int) -> NDArray[np.int32]:
        entry = self.manifest.shards[shard]
        path = self.directory / entry.file
        try:
            if self.manifest.storage == "tfrecord":
                lengths = [len(example["input_ids"]) for example in read_examples(path)]
            else:
                lengths = pq.read_table(path, columns=["length"])["length"].to_numpy()
        except (OSError, KeyError, ValueError, CorruptRecord, pa.ArrowException) as error:
            raise ShardError(f"{path}: cannot be read ({error})") from error
        if len(lengths) != entry.rows:
            raise ShardError(f"{path}: {len(lengths)} rows where {MANIFEST_FILE} has {entry.rows}")
        return np.asarray(lengths, dtype=np.int32)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Consecutive rows as flat columns, in the stored layout."""

    input_ids: NDArray[np.int32]  # (tokens of all rows,)
    word_starts: NDArray[np.bool_]  # (tokens of all rows,)
    ends: NDArray[np.int64]  # (rows + 1,), bounds of each row in the flat columns
    second: NDArray[np.int32]  # (rows,)
    is_random_next: NDArray[np.bool_]  # (rows,)

    @classmethod
    def of_table(cls, table: pa.Table) -> "_Rows":
        columns = {name: table[name].combine_chunks() for name in table.column_names}
        ids, starts = columns["input_ids"], columns["word_starts"]
        return cls(
            input_ids=ids.flatten().to_numpy().astype(np.int32),
            word_starts=starts.flatten().to_numpy(zero_copy_only=False),
            ends=np.cumsum([0, *columns["length"].to_numpy()]),
            second=columns["second"].to_numpy().astype(np.int32),
            is_random_next=columns["is_random_next"].to_numpy(zero_copy_only=False),
        )

    @classmethod
    def of_examples(cls, examples: Iterable[Mapping[str, Sequence[int]]]) -> "_Rows":
        rows = list(examples)
        return cls(
            input_ids=np.concatenate([np.asarray(row["input_ids"], dtype=np.int32) for row in rows]),
            word_starts=np.concatenate([np.asarray(row["word_starts"], dtype=bool) for row in rows]),
            ends=np.cumsum([0, *(len(row["input_ids"]) for row in rows)]),
            second=np.array([row["second"][0] for row in rows], dtype=np.int32),
            is_random_next=np.array([row["is_random_next"][0] for row in rows], dtype=bool),
        )

    def pair(self, row: int) -> Pair:
        tokens = slice(self.ends[row], self.ends[row + 1])
        return Pair(
            input_ids=self.input_ids[tokens],
            word_starts=self.word_starts[tokens],
            second=int(self.second[row]),
            is_random_next=bool(self.is_random_next[row]),
        )


def _table(pairs: Sequence[Pair], vocab_size: int) -> pa.Table:
    lengths = np.array([len(pair.input_ids) for pair in pairs], dtype=np.int32)
    ends = pa.array(np.cumsum([0, *lengths]), pa.int32())
    token = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    ids = np.concatenate([pair.input_ids for pair in pairs]).astype(token)
    starts = np.concatenate([pair.word_starts for pair in pairs])
    return pa.table(
        {
            "input_ids": pa.ListArray.from_arrays(ends, pa.array(ids)),
            "word_starts": pa.ListArray.from_arrays(ends, pa.array(starts)),
            "length": pa.array(lengths.astype(np.uint16)),
            "second": pa.array(np.array([pair.second for pair in pairs], dtype=np.uint16)),
            "is_random_next": pa.array([pair.is_random_next for pair in pairs], pa.bool_()),
        }
    )
