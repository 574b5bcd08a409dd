"""Answer all rows of Parquet files: the job behind ``bertqa batch``.

Every input file is cut into parts of some thousand rows, Ray Data hands the parts to worker processes, and each part
becomes one output file, written in one step. A journal in the output directory tells what has been asked of which model
and which parts are done, so that the same command, given again after whatever ended it, does what is left and leaves
the same files.
"""

import fcntl
import json
import logging
import os
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from tqdm import tqdm

from bertqa.command import say
from bertqa.manifest import sha256_of
from bertqa.repository import Repository
from service.batch_worker import ANSWER_COLUMNS, Asking, BatchStopped, Part, PartAnswerer, Receipt, is_text
from service.commands.batch import BatchOptions
from service.settings import Settings

JOURNAL_FILE = "_batch.jsonl"
"""In the output directory; readers of Parquet datasets pass over names that begin so."""
FORMAT = 1
"""Version of the journal's layout."""
_LOOPBACK = "127.0.0.1"
_OBJECT_STORE_BYTES = 100_000_000  # Ray holds only the parts' names and receipts


class BatchRefused(Exception):
    """The job cannot be begun as asked for; the message names the flag or file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """An input file as the job was begun with it."""

    name: str  # relative to --input
    rows: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What decides the bytes of the output; a job that is gone on with must be the one that was begun."""

    format: int
    model: str
    version: int
    identity: str  # of the engine
    asking: Asking
    max_question_chars: int
    max_context_chars: int
    part_rows: int
    sources: tuple[Source, ...]

    def parts(self, root: Path) -> list[Part]:
        """All parts in the order of their rows; a file without rows is one part without rows."""
        return [
            Part(
                name=f"part-{number:05}-{first // self.part_rows:06}.parquet",
                source=str(root / source.name if source.name else root),
                first=first,
                rows=min(self.part_rows, source.rows - first),
            )
            for number, source in enumerate(self.sources)
            for first in range(0, max(source.rows, 1), self.part_rows)
        ]


def run(args: BatchOptions) -> dict[str, Any]:
    """Answer all parts that are not done yet; gives what the whole job came to.

    Raises:
        BatchRefused: the input is not usable, or the output is that of another job.
        BundleMismatch: the repository has no usable model, or Triton another one.
        BatchStopped: the job could not go on.
    """
    asking = Asking(**{name: getattr(args, name) for name in Asking.__dataclass_fields__})
    try:
        settings = Settings.from_environment(os.environ)
    except ValueError as error:
        raise BatchRefused(str(error)) from error
    settings = settings.model_copy(
        update={
            "repository": args.repository.resolve(),
            "triton_url": args.triton_url or settings.triton_url,
            "max_in_flight": args.in_flight or settings.max_in_flight,
        }
    )
    if args.output.resolve().is_relative_to(args.input.resolve()):
        raise BatchRefused(f"--output {args.output}: must not lie in --input, whose files are read")
    sources = find_sources(args.input, asking)
    with closing(Journal(args.output)) as journal:
        # The model that the job was begun with, even if another version has become the active one since.
        repository = Repository(settings.repository)
        bundle = repository.open(args.model, journal.job["version"] if journal.job else None)
        job = Job(
            format=FORMAT,
            model=bundle.model,
            version=bundle.version,
            identity=bundle.manifest.identity,
            asking=asking,
            max_question_chars=settings.max_question_chars,
            max_context_chars=settings.max_context_chars,
            part_rows=args.part_rows,
            sources=sources,
        )
        journal.begin(job)
        parts = job.parts(args.input.resolve())
        done = journal.verified(parts)
        rows = sum(source.rows for source in sources)
        errors = sum(receipt.errors for receipt in done)
        todo = [part for part in parts if part.name not in {receipt.name for receipt in done}]
        directory = repository.directory(job.model, job.version)
        answerer = (directory, settings, asking, args.output.resolve(), args.patience)
        began = time.monotonic()
        with tqdm(total=rows, initial=sum(receipt.rows for receipt in done), unit="row", disable=None) as bar:
            for receipt in answered(todo, answerer, workers=args.workers, address=args.ray_address) if todo else ():
                if receipt.stopped:
                    raise BatchStopped(receipt.stopped)
                journal.record(receipt)
                errors += receipt.errors
                bar.update(receipt.rows)
        seconds = time.monotonic() - began
    return {
        "model": job.identity,
        "files": len(sources),
        "rows": rows,
        "errors": errors,
        "parts": len(parts),
        "parts_answered_now": len(todo),
        "rows_per_second": round(sum(part.rows for part in todo) / seconds, 1),
    }


def find_sources(root: Path, asking: Asking) -> tuple[Source, ...]:
    """Find the input files and look at their columns; each is read once, for its hash.

    Raises:
        BatchRefused: there is none, one is not Parquet, or a column is missing or not of text; the message names it.
    """
    # A directory may have such a name too, for what Spark writes is one.
    found = (path for path in root.rglob("*.parquet") if path.is_file())
    paths = [root] if root.is_file() else sorted(path for path in found if not _hidden(path.relative_to(root)))
    if not paths:
        raise BatchRefused(f"--input {root}: {'holds no *.parquet' if root.is_dir() else 'no such file or directory'}")
    id_types: dict[pa.DataType, Path] = {}
    for path in paths:
        try:
            schema = pq.read_schema(path)
        except (OSError, pa.ArrowException) as error:
            raise BatchRefused(f"--input {path}: not a readable Parquet file ({error})") from error
        for flag in ("question_column", "context_column"):
            kind = _column(schema, path, flag, getattr(asking, flag))
            if not is_text(kind):
                raise BatchRefused(f"{_flag(flag)} {getattr(asking, flag)}: must hold texts; in {path} it is {kind}")
        if asking.id_column is not None:
            id_types.setdefault(_column(schema, path, "id_column", asking.id_column), path)
    if asking.id_column in ANSWER_COLUMNS.names:
        raise BatchRefused(f"--id-column {asking.id_column}: the output has a column of its own with this name")
    if len(id_types) > 1:
        kinds = ", ".join(f"{kind} in {path}" for kind, path in id_types.items())
        raise BatchRefused(f"--id-column {asking.id_column}: must have one type, but is {kinds}")
    sources = []
    for path in tqdm(paths, desc="checking input", unit="file", leave=False, disable=None):
        name = path.relative_to(root).as_posix() if path != root else ""
        sources.append(Source(name=name, rows=pq.read_metadata(path).num_rows, sha256=sha256_of(path)))
    return tuple(sources)


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)  # as Spark and pyarrow have it


def _column(schema: pa.Schema, path: Path, flag: str, name: str) -> pa.DataType:
    found = schema.get_all_field_indices(name)
    if len(found) != 1:
        there = f"{len(found)} of this name" if found else f"only {', '.join(schema.names)}"
        raise BatchRefused(f"{_flag(flag)} {name}: must be one column; {path} has {there}")
    return schema.field(found[0]).type


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


class Journal:
    """The file that makes a job one that can be gone on with: what it is, and a `Receipt` for each part that is done.

    A JSON object a line, each on the disk before the next part is counted as done; a line that was cut off by a crash
    does not count. ``job`` is what was begun there before, or None.
    """

    def __init__(self, output: Path) -> None:
        """Open the journal of a directory, which is made if need be, and keep other jobs away from it.

        Raises:
            BatchRefused: another job is at work there, the directory holds something else, or cannot be written to.
        """
        self._output = output
        self._path = output / JOURNAL_FILE
        try:
            output.mkdir(parents=True, exist_ok=True)
            strangers = [] if self._path.exists() else sorted(entry.name for entry in output.iterdir())
            if strangers:
                raise BatchRefused(f"--output {output}: must be new or of this same job, but holds {strangers[0]}")
            self._file = self._path.open("a+b")
        except OSError as error:
            raise BatchRefused(f"--output {output}: cannot be written to ({error.strerror})") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.job, self._receipts = self._read()
        except BlockingIOError as error:
            self._file.close()
            raise BatchRefused(f"--output {output}: another job is at work there") from error
        except (ValueError, TypeError, KeyError) as error:
            self._file.close()
            raise BatchRefused(f"{self._path}: not readable ({error}); remove {output} to begin anew") from error

    def _read(self) -> tuple[Mapping[str, Any] | None, dict[str, Receipt]]:
        self._file.seek(0)
        whole, _, cut_off = self._file.read().rpartition(b"\n")
        self._file.truncate(self._file.tell() - len(cut_off))
        if not whole:
            return None, {}
        job, *receipts = map(json.loads, whole.splitlines())
        return job, {receipt["name"]: Receipt(**receipt) for receipt in receipts}

    def begin(self, job: Job) -> None:
        """Write down what is begun, or see that it is what was begun before.

        Raises:
            BatchRefused: it is another job; the message names the first difference.
        """
        stated = json.loads(json.dumps(asdict(job)))
        if self.job is None:
            self._append(stated)
            return
        before, now = _leaves(self.job), _leaves(stated)
        for name in {**before, **now}:
            if before.get(name) != now.get(name):
                raise BatchRefused(
                    f"--output {self._output}: the job begun there has {name} {before.get(name)}, this one has "
                    f"{now.get(name)}; take another directory, or remove that one to begin anew"
                )

    def verified(self, parts: Collection[Part]) -> list[Receipt]:
        """The receipts of the parts that are done, and whose files are still what was written."""
        for leftover in self._output.glob(".part-*"):
            leftover.unlink(missing_ok=True)
        done = [self._receipts[part.name] for part in parts if part.name in self._receipts]
        verified = []
        for receipt in tqdm(done, desc="checking output", unit="part", leave=False, disable=None):
            path = self._output / receipt.name
            if path.is_file() and sha256_of(path) == receipt.sha256:
                verified.append(receipt)
            else:
                say(f"{path}: {'changed' if path.exists() else 'gone'} since; answering its rows again")
        return verified

    def record(self, receipt: Receipt) -> None:
        """Write down that a part is done."""
        self._append(asdict(receipt))

    def close(self) -> None:
        """Let other jobs in."""
        self._file.close()

    def _append(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _leaves(values: Any, path: str = "") -> dict[str, Any]:
    """The values in a JSON value that hold no others, by the names on the way to them."""
    if isinstance(values, list):
        values = dict(enumerate(values))
    if not isinstance(values, Mapping):
        return {path: values}
    inner = (_leaves(value, f"{path} {name}".strip()) for name, value in values.items())
    return {name: leaf for leaves in inner for name, leaf in leaves.items()}


def answered(parts: Collection[Part], answerer: tuple[Any, ...], *, workers: int, address: str) -> Iterator[Receipt]:
    """Have parts answered by worker processes; gives the receipt of each as soon as it is there, in any order.

    A worker that dies is started again, and so is its part.

    Args:
        parts: at least one.
        answerer: arguments of `PartAnswerer`.
        workers: number of processes.
        address: of a Ray cluster; ``local`` starts one on this machine that ends with this process, however that ends.

    Raises:
        BatchRefused: there is no cluster at that address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to Ray's makers
    own: dict[str, Any] = (
        {}
        if address != "local"
        else {
            "num_cpus": workers,
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
            "_node_ip_address": _LOOPBACK,
        }
    )
    try:
        ray.init(
            address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **own,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise BatchRefused(f"--ray-address {address}: {error}") from error
    try:
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = False
        receipts = ray.data.from_items([asdict(part) for part in parts], override_num_blocks=len(parts)).map(
            PartAnswerer,  # type: ignore[arg-type]  # a class, which Ray makes the instances of
            fn_constructor_args=answerer,
            compute=ray.data.ActorPoolStrategy(size=workers),
        )
        for receipt in receipts.iter_rows():
            yield Receipt(**receipt)
    finally:
        ray.shutdown()
