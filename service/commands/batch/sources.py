"""Find the input files of a batch job and check their columns before answering rows."""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from bertqa.manifest import sha256_of
from service.commands.batch.errors import BatchRefused
from service.commands.batch.parquet import ANSWER_COLUMNS, is_text
from service.commands.batch.parts import Asking


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """An input file as it was when the job started."""

    name: str  # relative to --input
    rows: int
    sha256: str


def find_sources(root: Path, asking: Asking) -> tuple[Source, ...]:
    """Find the input files, check their columns, and hash each file.

    Raises:
        BatchRefused: there is no file, a file is not Parquet, or a column is missing or not text; the message names it.
    """
    # A directory may have such a name too: Spark writes one.
    found = (path for path in root.rglob("*.parquet") if path.is_file())
    paths = [root] if root.is_file() else sorted(path for path in found if not _hidden(path.relative_to(root)))
    if not paths:
        raise BatchRefused(
            f"--input {root}: {'has no *.parquet files' if root.is_dir() else 'no such file or directory'}"
        )
    _check_columns(paths, asking)
    sources = []
    for path in tqdm(paths, desc="checking input", unit="file", leave=False, disable=None):
        name = path.relative_to(root).as_posix() if path != root else ""
        sources.append(Source(name=name, rows=pq.read_metadata(path).num_rows, sha256=sha256_of(path)))
    return tuple(sources)


def _check_columns(paths: list[Path], asking: Asking) -> None:
    id_types: dict[pa.DataType, Path] = {}
    for path in paths:
        try:
            schema = pq.read_schema(path)
        except (OSError, pa.ArrowException) as error:
            raise BatchRefused(f"--input {path}: not a readable Parquet file ({error})") from error
        for flag in ("question_column", "context_column"):
            kind = _column(schema, path, flag, getattr(asking, flag))
            if not is_text(kind):
                raise BatchRefused(
                    f"{_flag(flag)} {getattr(asking, flag)}: must be a text column; in {path} it is {kind}"
                )
        if asking.id_column is not None:
            id_types.setdefault(_column(schema, path, "id_column", asking.id_column), path)
    if asking.id_column in ANSWER_COLUMNS.names:
        raise BatchRefused(f"--id-column {asking.id_column}: the output already has a column with this name")
    if len(id_types) > 1:
        kinds = ", ".join(f"{kind} in {path}" for kind, path in id_types.items())
        raise BatchRefused(f"--id-column {asking.id_column}: must have one type, but is {kinds}")


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)  # as Spark and pyarrow define it


def _column(schema: pa.Schema, path: Path, flag: str, name: str) -> pa.DataType:
    found = schema.get_all_field_indices(name)
    if len(found) != 1:
        there = f"{len(found)} of this name" if found else f"only {', '.join(schema.names)}"
        raise BatchRefused(f"{_flag(flag)} {name}: must be one column; {path} has {there}")
    return schema.field(found[0]).type


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
