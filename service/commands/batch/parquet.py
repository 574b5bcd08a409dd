"""Read the rows of a part from Parquet, a few at a time, and write its answers atomically."""

import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from bertqa.manifest import sha256_of
from service.commands.batch.errors import BatchStopped
from service.commands.batch.parts import Asking, Part

ANSWER_COLUMNS = pa.schema(
    [
        ("answer", pa.string()),
        ("start", pa.int32()),
        ("end", pa.int32()),
        ("score", pa.float64()),
        ("has_answer", pa.bool_()),
        ("null_score", pa.float64()),
        ("windows", pa.int32()),
        ("truncated", pa.bool_()),
        ("error", pa.string()),
    ]
)
"""Columns next to the id, named as in ``/v1/answer``. Successful rows have a null ``error``; failed rows have only
``error`` and the id. A row without an answer, if allowed, has null in ``answer`` to ``score``.
"""
ROW_COLUMN = "row"
"""Replaces the id column if the input has none: the row's number in its file, from 0."""
MODEL_KEY = b"bertqa.model"
"""Key in the metadata of each output file; the value is the identity of the engine."""
_READ_ROWS = 64


class PartReader:
    """Reads the texts of a part a few rows at a time; the ids are complete when all rows are read."""

    def __init__(self, part: Part, asking: Asking) -> None:
        self._part = part
        self._asking = asking
        self._ids: list[pa.Array] = []
        self.id_field = pa.field(ROW_COLUMN, pa.int64(), nullable=False)
        """Name and type of the ids."""
        if asking.id_column is not None:
            self.id_field = pq.read_schema(part.source).field(asking.id_column)

    def __iter__(self) -> Iterator[tuple[bytes | None, bytes | None]]:
        """Yield question and context of each row, as bytes from the file.

        Raises:
            BatchStopped: the file cannot be read, or has fewer rows than its footer says.
        """
        asking, part = self._asking, self._part
        missing = part.rows
        try:
            for batch in self._batches():
                missing -= batch.num_rows
                if asking.id_column is not None:
                    self._ids.append(batch.column(asking.id_column))
                yield from zip(
                    _bytes(batch.column(asking.question_column)),
                    _bytes(batch.column(asking.context_column)),
                    strict=True,
                )
        except (OSError, pa.ArrowException) as error:
            raise BatchStopped(f"{part.source}: cannot be read from row {part.first} on: {error}") from error
        if missing:
            raise BatchStopped(f"{part.source}: has {missing} fewer rows than its footer says")

    @property
    def ids(self) -> pa.ChunkedArray:
        """The id of each row."""
        if self._asking.id_column is not None:
            return pa.chunked_array(self._ids, self.id_field.type)
        first = self._part.first
        return pa.chunked_array([pa.array(range(first, first + self._part.rows), pa.int64())])

    def _batches(self) -> Iterator[pa.RecordBatch]:
        part, asking = self._part, self._asking
        columns = {asking.question_column, asking.context_column, asking.id_column or asking.question_column}
        # Without a buffer, or with a pre-filled one, the reader holds a whole row group.
        with pq.ParquetFile(part.source, buffer_size=1 << 20, pre_buffer=False) as file:
            groups: list[int] = []
            skip = start = 0
            for number in range(file.num_row_groups):
                end = start + file.metadata.row_group(number).num_rows
                if start < part.first + part.rows and end > part.first:
                    skip = skip if groups else part.first - start
                    groups.append(number)
                start = end
            wanted = part.rows
            for batch in file.iter_batches(_READ_ROWS, row_groups=groups, columns=sorted(columns)) if groups else ():
                piece = batch.slice(skip, wanted)  # empty while the whole batch is skipped
                skip -= min(skip, batch.num_rows)
                wanted -= piece.num_rows
                if piece.num_rows:
                    yield piece
                if not wanted:
                    return


def write_whole(path: Path, table: pa.Table) -> str:
    """Write a Parquet file atomically, so that a crash leaves no partial file; returns its SHA-256."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    pq.write_table(table, partial, compression="zstd")
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    sha256 = sha256_of(partial)
    partial.replace(path)
    return sha256


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds text: strings, bytes in UTF-8, or only nulls."""
    if pa.types.is_dictionary(kind):
        return is_text(kind.value_type)
    tests = ("is_string", "is_large_string", "is_string_view", "is_binary", "is_large_binary", "is_binary_view")
    return any(getattr(pa.types, test)(kind) for test in (*tests, "is_null"))


def _bytes(column: pa.Array) -> list[bytes | None]:
    # Not as strings: Parquet does not enforce UTF-8, and one invalid string would fail all rows.
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    found: list[bytes | None] = column.cast(pa.large_binary()).to_pylist()
    return found
