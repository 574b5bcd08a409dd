"""The journal of a batch job: which job an output directory belongs to, and which parts are finished."""

import fcntl
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from bertqa.cli.command import say
from bertqa.manifest import sha256_of
from service.commands.batch.errors import BatchRefused
from service.commands.batch.parts import Part, Receipt

if TYPE_CHECKING:
    from service.commands.batch.job import Job

JOURNAL_FILE = "_batch.jsonl"
"""File in the output directory; readers of Parquet datasets skip names that start with an underscore."""


class Journal:
    """The file that makes a job resumable: the job's definition, then a `Receipt` for each finished part.

    One JSON object per line, flushed to disk before the next part counts as done. A line that a crash cut off is
    dropped. ``job`` is the job that was started in this directory before, or None.
    """

    def __init__(self, output: Path) -> None:
        """Open the journal of a directory, creating both if needed, and lock other jobs out.

        Raises:
            BatchRefused: another job is running there, or the directory holds other files or is not writable.
        """
        self._output = output
        self._path = output / JOURNAL_FILE
        try:
            output.mkdir(parents=True, exist_ok=True)
            strangers = [] if self._path.exists() else sorted(entry.name for entry in output.iterdir())
            if strangers:
                raise BatchRefused(f"--output {output}: must be new or belong to this job, but contains {strangers[0]}")
            self._file = self._path.open("a+b")
        except OSError as error:
            raise BatchRefused(f"--output {output}: not writable ({error.strerror})") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.job, self._receipts = self._read()
        except BlockingIOError as error:
            self._file.close()
            raise BatchRefused(f"--output {output}: another job is running there") from error
        except (ValueError, TypeError, KeyError) as error:
            self._file.close()
            raise BatchRefused(f"{self._path}: not readable ({error}); remove {output} to start again") from error

    def _read(self) -> tuple[Mapping[str, Any] | None, dict[str, Receipt]]:
        self._file.seek(0)
        whole, _, cut_off = self._file.read().rpartition(b"\n")
        self._file.truncate(self._file.tell() - len(cut_off))
        if not whole:
            return None, {}
        job, *receipts = map(json.loads, whole.splitlines())
        return job, {receipt["name"]: Receipt(**receipt) for receipt in receipts}

    def begin(self, job: "Job") -> None:
        """Record a new job, or check that a resumed one is the job in the journal.

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
                    f"--output {self._output}: the job there has {name} {before.get(name)}, but this job has "
                    f"{now.get(name)}; choose another directory, or remove that one to start again"
                )

    def verified(self, parts: Collection[Part]) -> list[Receipt]:
        """Return receipts of the finished parts whose files are unchanged; reports the other files."""
        for leftover in self._output.glob(".part-*"):
            leftover.unlink(missing_ok=True)
        done = [self._receipts[part.name] for part in parts if part.name in self._receipts]
        verified = []
        for receipt in tqdm(done, desc="checking output", unit="part", leave=False, disable=None):
            path = self._output / receipt.name
            if path.is_file() and sha256_of(path) == receipt.sha256:
                verified.append(receipt)
            else:
                say(f"{path}: {'changed' if path.exists() else 'missing'}; answering its rows again")
        return verified

    def record(self, receipt: Receipt) -> None:
        """Record a finished part."""
        self._append(asdict(receipt))

    def close(self) -> None:
        """Close the file and unlock it for other jobs."""
        self._file.close()

    def _append(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _leaves(values: Any, path: str = "") -> dict[str, Any]:
    """Flatten a JSON value: its scalars by their path, with spaces between names."""
    if isinstance(values, list):
        values = dict(enumerate(values))
    if not isinstance(values, Mapping):
        return {path: values}
    inner = (_leaves(value, f"{path} {name}".strip()) for name, value in values.items())
    return {name: leaf for leaves in inner for name, leaf in leaves.items()}
