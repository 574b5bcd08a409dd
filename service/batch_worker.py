"""A part of a batch job: some rows of a Parquet file in, one row for each of them out, in a file that appears whole.

Knows no Ray and no other part: a `PartAnswerer` lives in a process of its own and is given one part after the other.
Rows take the path of ``/v1/answer`` less HTTP, so that their answers and errors are those of the service.
"""

import asyncio
import math
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from bertqa.backoff import pauses
from bertqa.errors import InvalidArgument
from bertqa.graphemes import OffsetUnit
from bertqa.manifest import Bundle, BundleMismatch, sha256_of
from bertqa.spans import InvalidLogits, Logits
from bertqa.windows import Window
from service.api.errors import first_problem
from service.api.schemas import AnswerRequest, AnswerResponse
from service.api.v1 import to_question, to_response
from service.inference.pipeline import Pipeline, side_by_side
from service.inference.question import Question, Result
from service.inference.registry import ModelRegistry, ServedModel
from service.observability.metrics import Metrics
from service.settings import Settings
from service.triton.admin import EngineAdmin, Loaded
from service.triton.channels import Channels, EngineFactory
from service.triton.client import Engine
from service.triton.errors import ModelError, ModelOverloaded

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
"""What stands beside the id in each row, named as in ``/v1/answer``. Null is ``error`` in a row that has none,
everything else in a row that has one, and ``answer`` to ``score`` where the text gives no answer and that was allowed.
"""
ROW_COLUMN = "row"
"""Stands in the place of the id where the input has none: the row's number in its file, from 0."""
MODEL_KEY = b"bertqa.model"
"""Key in the metadata of each output file, for the identity of the engine."""

CALL_S = 120.0
"""Seconds in which the engine must have computed a window that was sent to it."""
IN_FLIGHT = 64
"""Windows of a process that are with the engine at one time, where nothing else is said."""
_MAX_WAIT_S = 3600.0
_MAX_MEMORY_MB = 4096
_SUSPECT_ATTEMPTS = 3
_READ_ROWS = 64
_FAILURES = (ModelError, InvalidLogits)
"""What may be a question's fault, or an engine's that is away or broken."""


class BatchStopped(Exception):
    """The job cannot go on; what is done stays done. The message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Consecutive rows of an input file, and the file that their answers go to."""

    name: str  # of the output file
    source: str  # path of the input file
    first: int  # row of it
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What a part came to."""

    name: str
    rows: int = 0
    errors: int = 0  # rows with an error
    sha256: str = ""  # of the output file
    stopped: str = ""  # why the job cannot go on; then nothing was written


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """What decides how a row is asked and what comes out."""

    question_column: str
    context_column: str
    id_column: str | None
    max_answer_tokens: int
    no_answer: bool
    offset_unit: OffsetUnit


class PartAnswerer:
    """Answers parts, many rows of one at a time; one instance in each process."""

    def __init__(
        self,
        bundle: Path,
        settings: Settings,
        asking: Asking,
        output: Path,
        patience_s: float,
        *,
        engine: EngineFactory | None = None,
    ) -> None:
        """Open the bundle; Triton is connected to when first needed.

        Args:
            bundle: directory of the version of the model to be asked.
            settings: of the service; its limits, Triton's addresses and the windows in flight are those of this
                process.
            asking: how rows are asked.
            output: directory of the parts' files.
            patience_s: seconds without an answer from the engine after which the job is stopped.
            engine: by default the model in Triton.

        Raises:
            BundleMismatch: as in `Bundle.open`.
        """
        self._bundle = Bundle.open(bundle)
        self._asking = asking
        self._output = output
        self._patience_s = patience_s
        self._at_a_time = settings.max_in_flight or IN_FLIGHT
        self._loop = asyncio.new_event_loop()
        self._loop.run_until_complete(self._connect(engine, _patient(settings, self._at_a_time)))

    async def _connect(self, engine: EngineFactory | None, settings: Settings) -> None:
        bundle, metrics = self._bundle, Metrics()
        self._engines = SteadyEngines(engine or Channels.from_settings(settings), self._patience_s)
        self._served = ServedModel(bundle, self._engines, metrics, settings)
        self._pipeline = Pipeline(ModelRegistry(bundle.model, {bundle.model: self._served}), settings, metrics)
        self._suspects = asyncio.Lock()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Answer the `Part` with these fields, and give the fields of its `Receipt`."""
        part = Part(**row)
        try:
            receipt = self._loop.run_until_complete(self._answer(part))
        except (BatchStopped, BundleMismatch, OSError, pa.ArrowException) as error:
            receipt = Receipt(name=part.name, stopped=f"{part.name}: {error}")
        return asdict(receipt)

    def close(self) -> None:
        """End the connections."""
        self._loop.run_until_complete(self._engines.close())
        self._pipeline.close()
        self._loop.close()

    async def _answer(self, part: Part) -> Receipt:
        reader = PartReader(part, self._asking)
        rows = enumerate(reader)
        answers: list[dict[str, Any]] = [{}] * part.rows

        async def work() -> None:
            for number, texts in rows:  # shared by all
                answers[number] = await self._row(*texts)

        await side_by_side([work() for _ in range(min(self._at_a_time, part.rows))])
        table = pa.Table.from_pylist(answers, ANSWER_COLUMNS).add_column(0, reader.id_field, reader.ids)
        table = table.replace_schema_metadata({MODEL_KEY: self._bundle.manifest.identity})
        sha256 = write_whole(self._output / part.name, table)
        return Receipt(name=part.name, rows=part.rows, errors=part.rows - table["error"].null_count, sha256=sha256)

    async def _row(self, question: bytes | None, context: bytes | None) -> dict[str, Any]:
        """Answer a row; gives those of its `ANSWER_COLUMNS` that are not null."""
        asking = self._asking
        try:
            query = AnswerRequest(
                question=_text("question", question),
                context=_text("context", context),
                max_answer_tokens=asking.max_answer_tokens,
                no_answer=asking.no_answer,
                offset_unit=asking.offset_unit,
            )
            result = await self._result(to_question(query, self._served))
        except ValidationError as error:
            return {"error": str(self._in_words_of_the_file(first_problem(error.errors())))}
        except InvalidArgument as error:
            return {"error": str(self._in_words_of_the_file(error))}
        except _FAILURES as error:
            return {"error": f"engine: {error}"}
        return _columns(to_response(query, result))

    def _in_words_of_the_file(self, error: InvalidArgument) -> InvalidArgument:
        match error.location:
            case ("context",) | ("contexts", *_):
                return error.at(self._asking.context_column)
            case ("question",):
                return error.at(self._asking.question_column)
        return error

    async def _result(self, question: Question) -> Result:
        """Answer a question, however often the engine is away meanwhile, or find that it fails on this one alone.

        Raises:
            InvalidArgument: the question is outside the limits.
            ModelError, InvalidLogits: the engine fails on it, time and again right after a harmless one.
            BundleMismatch: Triton has loaded another engine.
            BatchStopped: the engine has been away for longer than the patience.
        """
        try:
            return (await self._pipeline.answer([question], deadline=math.inf))[0]
        except _FAILURES as error:
            failure: Exception = error
        # One that breaks the engine fails those beside it too. From here on they are asked one after the other, so that
        # each is with the engine alone but for new ones, and those of other workers hardly ever three times.
        async with self._suspects:
            for _ in range(_SUSPECT_ATTEMPTS):
                await self._until_sound()
                await asyncio.sleep(random.uniform(0, 0.01))
                try:
                    return (await self._pipeline.answer([question], deadline=math.inf))[0]
                except _FAILURES as error:
                    failure = error
        raise failure

    async def _until_sound(self) -> None:
        harmless = Question(model=self._served, question="Is it ready?", contexts=("It is ready.",))
        began = time.monotonic()
        for pause in pauses():
            left_s = began + self._patience_s - time.monotonic()
            try:
                await self._pipeline.answer([harmless], deadline=time.monotonic() + max(left_s, 1.0))
                return
            except _FAILURES as error:
                if left_s <= 0:
                    seconds = f"{time.monotonic() - began:.0f} s"
                    raise BatchStopped(f"the engine has answered no question for {seconds}: {error}") from error
            await asyncio.sleep(pause)


class SteadyEngines:
    """Makes clients for callers who can wait, from those of another factory."""

    def __init__(self, engines: EngineFactory, patience_s: float) -> None:
        self._engines = engines
        self._patience_s = patience_s

    def engine(self, model: str, version: int) -> "SteadyEngine":
        """Make the engine client for a version of a model."""
        return SteadyEngine(self._engines.engine(model, version), self._patience_s)

    def admin(self, model: str, version: int) -> "SteadyAdmin":
        """Make the admin client for a version of a model."""
        return SteadyAdmin(self._engines.admin(model, version))

    async def close(self) -> None:
        """Close the connections."""
        await self._engines.close()


class SteadyAdmin:
    """An `EngineAdmin` each of whose calls has `CALL_S`, however late the deadline is."""

    def __init__(self, admin: EngineAdmin) -> None:
        self._admin = admin

    async def check_ready(self, *, deadline: float) -> None:
        """Return if the model can be called, as described in `EngineAdmin`."""
        await self._admin.check_ready(deadline=_soon(deadline))

    async def loaded(self, *, deadline: float) -> Loaded:
        """Look up what the server has loaded, as described in `EngineAdmin`."""
        return await self._admin.loaded(deadline=_soon(deadline))

    async def server_version(self, *, deadline: float) -> str:
        """Look up the version of the server, as described in `EngineAdmin`."""
        return await self._admin.server_version(deadline=_soon(deadline))


class SteadyEngine:
    """An engine for those who can wait: a window that is refused is asked again."""

    def __init__(self, engine: Engine, patience_s: float) -> None:
        self._engine = engine
        self._patience_s = patience_s
        self._heard = time.monotonic()

    async def predict(self, windows: Sequence[Window], *, deadline: float) -> list[Logits]:
        """As in `Engine`, but each window has `CALL_S`, and never `ModelOverloaded`.

        Raises:
            BatchStopped: windows have been refused, and none computed, for longer than the patience.
        """
        return await side_by_side([self._predict(window, deadline) for window in windows])

    async def _predict(self, window: Window, deadline: float) -> Logits:
        began = time.monotonic()
        for pause in pauses():
            try:
                (logits,) = await self._engine.predict([window], deadline=_soon(deadline))
            except ModelOverloaded as error:
                quiet_s = time.monotonic() - max(began, self._heard)
                if quiet_s > self._patience_s:
                    raise BatchStopped(f"the engine has computed nothing for {quiet_s:.0f} s: {error}") from error
            else:
                self._heard = time.monotonic()
                return logits
            await asyncio.sleep(pause)
        raise AssertionError("there is always another pause")


class PartReader:
    """Reads the texts of a part a few rows at a time; once all are read, it has the ids."""

    def __init__(self, part: Part, asking: Asking) -> None:
        self._part = part
        self._asking = asking
        self._ids: list[pa.Array] = []
        self.id_field = pa.field(ROW_COLUMN, pa.int64(), nullable=False)
        """Name and type of the ids."""
        if asking.id_column is not None:
            self.id_field = pq.read_schema(part.source).field(asking.id_column)

    def __iter__(self) -> Iterator[tuple[bytes | None, bytes | None]]:
        """Question and context of each row, as the bytes in the file.

        Raises:
            BatchStopped: the file cannot be read, or has fewer rows than it says.
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
            raise BatchStopped(f"{part.source}: has {missing} rows fewer than its footer says")

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
        # Without a buffer, or with it filled in advance, the reader would hold a whole row group.
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
                piece = batch.slice(skip, wanted)  # empty while all of the batch is to be skipped
                skip -= min(skip, batch.num_rows)
                wanted -= piece.num_rows
                if piece.num_rows:
                    yield piece
                if not wanted:
                    return


def write_whole(path: Path, table: pa.Table) -> str:
    """Write a Parquet file that is there whole or not at all, whatever dies meanwhile; gives its SHA-256."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    pq.write_table(table, partial, compression="zstd")
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    sha256 = sha256_of(partial)
    partial.replace(path)
    return sha256


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds texts: strings, bytes in UTF-8, or nothing but nulls."""
    if pa.types.is_dictionary(kind):
        return is_text(kind.value_type)
    tests = ("is_string", "is_large_string", "is_string_view", "is_binary", "is_large_binary", "is_binary_view")
    return any(getattr(pa.types, test)(kind) for test in (*tests, "is_null"))


def _bytes(column: pa.Array) -> list[bytes | None]:
    # Not as strings: those of a Parquet file need not be UTF-8, and one that is not would fail all.
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    found: list[bytes | None] = column.cast(pa.large_binary()).to_pylist()
    return found


def _text(field: str, raw: bytes | None) -> str:
    if raw is None:
        raise InvalidArgument((field,), "must not be null")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidArgument((field,), f"not valid UTF-8 at byte {error.start}") from None


def _columns(response: AnswerResponse) -> dict[str, Any]:
    found = {name: getattr(response, name) for name in ("has_answer", "null_score", "windows", "truncated")}
    if response.answers:
        best = response.answers[0]
        found |= {"answer": best.text, "start": best.start, "end": best.end, "score": best.score}
    return found


def _patient(settings: Settings, at_a_time: int) -> Settings:
    """Those of a job, whose rows are never refused for others of its rows."""
    changes = {"max_in_flight": at_a_time, "max_wait_s": _MAX_WAIT_S, "max_memory_mb": _MAX_MEMORY_MB}
    return settings.model_copy(update=changes)


def _soon(deadline: float) -> float:
    return min(deadline, time.monotonic() + CALL_S)
