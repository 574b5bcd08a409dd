"""Answer all rows of Parquet files: the job behind ``bertqa batch``.

Every input file is cut into parts of a few thousand rows, worker processes answer the parts, and each part becomes one
output file, written atomically. A journal in the output directory records the model, the options and the finished
parts. So the same command, run again after an interruption, does the remaining parts and writes the same files.
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bertqa.repository import Repository
from service.commands.batch import BatchOptions
from service.commands.batch.errors import BatchRefused, BatchStopped
from service.commands.batch.journal import Journal
from service.commands.batch.parts import Asking, Part, Receipt
from service.commands.batch.ray_workers import answered
from service.commands.batch.sources import Source, find_sources
from service.settings import Settings

FORMAT = 1
"""Version of the journal format."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything that determines the bytes of the output; a resumed job must equal the one in the journal."""

    format: int
    model: str
    version: int
    identity: str  # of the engine
    asking: Asking
    max_question_chars: int
    max_context_chars: int
    part_rows: int
    sources: tuple[Source, ...]

    @property
    def rows(self) -> int:
        """Rows of all input files."""
        return sum(source.rows for source in self.sources)

    def parts(self, root: Path) -> list[Part]:
        """Return all parts in the order of their rows; a file without rows is one empty part."""
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
    """Answer all parts that are not finished; returns the summary of the whole job.

    Raises:
        BatchRefused: the input is unusable, or the output belongs to another job.
        BundleMismatch: the repository has no usable model, or Triton has loaded another one.
        BatchStopped: the job could not continue.
    """
    asking = Asking(**{field.name: getattr(args, field.name) for field in fields(Asking)})
    settings = _settings(args)
    if args.output.resolve().is_relative_to(args.input.resolve()):
        raise BatchRefused(f"--output {args.output}: must not be inside --input")
    sources = find_sources(args.input, asking)
    with closing(Journal(args.output)) as journal:
        job = _job(args, settings, asking, sources, journal.job)
        journal.begin(job)
        parts = job.parts(args.input.resolve())
        done = journal.verified(parts)
        names = {receipt.name for receipt in done}
        todo = [part for part in parts if part.name not in names]
        directory = Repository(settings.repository).directory(job.model, job.version)
        answerer = (directory, settings, asking, args.output.resolve(), args.patience)
        began = time.monotonic()
        errors = sum(receipt.errors for receipt in done)
        with tqdm(total=job.rows, initial=sum(receipt.rows for receipt in done), unit="row", disable=None) as bar:
            for receipt in _receipts(args, todo, answerer, journal):
                errors += receipt.errors
                bar.update(receipt.rows)
        seconds = time.monotonic() - began
    return {
        "model": job.identity,
        "files": len(sources),
        "rows": job.rows,
        "errors": errors,
        "parts": len(parts),
        "parts_answered_now": len(todo),
        "rows_per_second": round(sum(part.rows for part in todo) / seconds, 1),
    }


def _settings(args: BatchOptions) -> Settings:
    try:
        settings = Settings.from_environment(os.environ)
    except ValueError as error:
        raise BatchRefused(str(error)) from error
    changes = {
        "repository": args.repository.resolve(),
        "triton_url": args.triton_url or settings.triton_url,
        "max_in_flight": args.in_flight or settings.max_in_flight,
    }
    return settings.model_copy(update=changes)


def _job(
    args: BatchOptions,
    settings: Settings,
    asking: Asking,
    sources: tuple[Source, ...],
    before: Mapping[str, Any] | None,
) -> Job:
    # A resumed job keeps its model version, even if another one has become active since.
    bundle = Repository(settings.repository).open(args.model, before["version"] if before else None)
    return Job(
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


def _receipts(
    args: BatchOptions, todo: Sequence[Part], answerer: tuple[Any, ...], journal: Journal
) -> Iterator[Receipt]:
    if not todo:
        return
    for receipt in answered(todo, answerer, workers=args.workers, address=args.ray_address):
        if receipt.stopped:
            raise BatchStopped(receipt.stopped)
        journal.record(receipt)
        yield receipt
