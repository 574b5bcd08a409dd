"""Read and write documents: folders of Parquet files with one row per document.

A row has the document's ``id`` (its source), its ``title`` and its ``paragraphs``, a list of plain-text strings without
line breaks. Each row group has about a megabyte of text, so that processes can share a file.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

GROUP_BYTES = 1 << 20
"""Characters of text after which a row group is full."""
IDENTITY_FILE = "documents.json"
_SCHEMA = pa.schema([("id", pa.string()), ("title", pa.string()), ("paragraphs", pa.list_(pa.string()))])


class DataError(ValueError):
    """Data is missing, malformed or inconsistent; the message names the file or the flag."""


class Document(NamedTuple):
    """A text, as a list of paragraphs."""

    id: str  # e.g. "enwiki-20260901/12"
    title: str
    paragraphs: Sequence[str]  # none empty, without line breaks


class DocumentGroup(NamedTuple):
    """A row group of a file of documents."""

    path: Path
    number: int  # in the file
    documents: int
    bytes: int  # of its columns before compression


def open_output(directory: Path, identity: Mapping[str, object]) -> None:
    """Create a folder for the documents of one source, or continue an existing folder of the same source.

    Args:
        directory: a folder only for these documents.
        identity: everything that decides the documents; stored in ``documents.json``.

    Raises:
        DataError: the folder contains documents of another source.
    """
    path = directory / IDENTITY_FILE
    described = json.dumps(identity, indent=1, sort_keys=True) + "\n"
    if path.exists():
        if path.read_text() != described:
            other = " ".join(path.read_text().split())
            raise DataError(f"{directory}: holds documents of {other}; give another --output")
        return
    if directory.is_dir() and any(directory.glob("*.parquet")):
        raise DataError(f"{directory}: holds Parquet files without a {IDENTITY_FILE}; give another --output")
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / f".{IDENTITY_FILE}.partial"
    partial.write_text(described)
    os.replace(partial, path)


def write_documents(path: Path, documents: Iterable[Document]) -> int:
    """Write a file of documents atomically, without documents that have no paragraphs.

    Returns:
        The number of documents written.
    """
    partial = path.with_name(f".{path.name}.partial")
    written, group, size = 0, list[Document](), 0
    with pq.ParquetWriter(partial, _SCHEMA, compression="zstd", write_statistics=False) as writer:

        def flush() -> None:
            columns = [[getattr(document, name) for document in group] for name in _SCHEMA.names]
            writer.write_table(pa.table(columns, schema=_SCHEMA))
            group.clear()

        for document in documents:
            if not document.paragraphs:
                continue
            group.append(document)
            written += 1
            size += sum(map(len, document.paragraphs))
            if size >= GROUP_BYTES:
                flush()
                size = 0
        if group:
            flush()
    os.replace(partial, path)
    return written


def document_files(directories: Sequence[Path]) -> list[Path]:
    """Return the files of some folders of documents, in order of folder and file name.

    Raises:
        DataError: a folder contains no documents, or is given twice.
    """
    files: list[Path] = []
    for directory in directories:
        found = sorted(directory.glob("*.parquet"))
        if not found:
            raise DataError(f"{directory}: holds no documents (*.parquet); `python -m training.data text` makes some")
        if set(found) & set(files):
            raise DataError(f"{directory}: is given twice")
        files += found
    return files


def document_groups(path: Path) -> list[DocumentGroup]:
    """Return the row groups of a file of documents.

    Raises:
        DataError: the file is corrupt or not a file of documents.
    """
    try:
        with pq.ParquetFile(path) as file:
            if not file.schema_arrow.equals(_SCHEMA):
                raise DataError(f"{path}: has other columns than {', '.join(_SCHEMA.names)}")
            groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
            return [DocumentGroup(path, n, group.num_rows, group.total_byte_size) for n, group in enumerate(groups)]
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not readable ({error})") from error


def read_group(group: DocumentGroup) -> list[Document]:
    """Read the documents of a row group.

    Raises:
        DataError: the file is corrupt.
    """
    try:
        with pq.ParquetFile(group.path) as file:
            columns = file.read_row_group(group.number).to_pydict()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{group.path}: not readable ({error})") from error
    return [Document(*row) for row in zip(*(columns[name] for name in _SCHEMA.names), strict=True)]
