"""Answer one part of a batch job: read its rows, call the engine, write one output row for each.

Independent of Ray and of other parts: a `PartAnswerer` runs in its own process and gets one part after another. Rows
take the path of ``/v1/answer`` without HTTP, so their answers and errors are those of the service.
"""

import asyncio
import math
import random
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import ValidationError

from bertqa.backoff import pause_of, pauses
from bertqa.errors import InvalidArgument
from bertqa.manifest import Bundle, BundleMismatch
from bertqa.spans import InvalidLogits
from service.api.errors import first_problem
from service.api.schemas import AnswerRequest, AnswerResponse
from service.api.v1 import to_question, to_response
from service.commands.batch.errors import BatchStopped
from service.commands.batch.parquet import ANSWER_COLUMNS, MODEL_KEY, PartReader, write_whole
from service.commands.batch.parts import Asking, Part, Receipt
from service.commands.batch.steady_engine import SteadyEngines
from service.inference.pipeline import Pipeline, side_by_side
from service.inference.question import Question, Result
from service.inference.registry import ModelRegistry, ServedModel
from service.observability.metrics import Metrics
from service.settings import Settings
from service.triton.channels import Channels, EngineFactory
from service.triton.errors import EngineError, EngineOverloaded

IN_FLIGHT = 64
"""Default number of windows that a process has in flight at the engine."""
_MAX_WAIT_S = 3600.0
_MAX_MEMORY_MB = 4096
_SUSPECT_ATTEMPTS = 3
_FAILURES = (EngineError, InvalidLogits)
"""Errors caused by a question, or by an engine that is unavailable or broken."""


class PartAnswerer:
    """Answers parts, many rows at a time; each process has one instance."""

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
        """Open the bundle; connects to Triton on first use.

        Args:
            bundle: directory of the model version.
            settings: settings of the service: limits, addresses of Triton, and windows in flight of this process.
            asking: options for answering rows.
            output: directory for the output files.
            patience_s: seconds without an answer from the engine after which the job stops.
            engine: default: the model in Triton.

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
        """Answer the `Part` with these fields; returns the fields of its `Receipt`."""
        part = Part(**row)
        try:
            receipt = self._loop.run_until_complete(self._answer(part))
        except (BatchStopped, BundleMismatch, OSError, pa.ArrowException) as error:
            receipt = Receipt(name=part.name, stopped=f"{part.name}: {error}")
        return asdict(receipt)

    def close(self) -> None:
        """Close the connections."""
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
        """Answer a row; returns those of its `ANSWER_COLUMNS` that are not null."""
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
        """Answer a question; waits while the engine is unavailable, and detects if only this question fails.

        Raises:
            InvalidArgument: the question is outside the limits.
            EngineError, InvalidLogits: the engine fails on it repeatedly, each time right after a harmless question.
            BundleMismatch: Triton has loaded another engine.
            BatchStopped: the engine has been unavailable for longer than the time limit.
        """
        try:
            return await self._ask(question)
        except _FAILURES as error:
            failure: Exception = error
        # A question that breaks the engine also fails the questions in flight with it. So we retry failed ones one at a
        # time. Only new questions, or those of other workers, run with them, and hardly ever three times.
        async with self._suspects:
            for _ in range(_SUSPECT_ATTEMPTS):
                await self._until_sound()
                await asyncio.sleep(random.uniform(0, 0.01))
                try:
                    return await self._ask(question)
                except _FAILURES as error:
                    failure = error
        raise failure

    async def _ask(self, question: Question) -> Result:
        """Answer a question; retries while the pipeline is too busy to admit it.

        Raises:
            BatchStopped: it was not admitted within the time limit.
            Exception: as in `Pipeline.answer`, but never `EngineOverloaded`.
        """
        began = time.monotonic()
        for pause_s in pauses():
            try:
                return (await self._pipeline.answer([question], deadline=math.inf))[0]
            except EngineOverloaded as error:
                waited_s = time.monotonic() - began
                if waited_s > self._patience_s:
                    raise BatchStopped(f"a question was rejected for {waited_s:.0f} s: {error}") from error
                await asyncio.sleep(min(pause_of(pause_s, error.retry_after_s), self._patience_s))
        raise AssertionError("pauses never end")

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
    """Return settings for a job, so that its rows are not rejected because of each other."""
    changes = {"max_in_flight": at_a_time, "max_wait_s": _MAX_WAIT_S, "max_memory_mb": _MAX_MEMORY_MB}
    return settings.model_copy(update=changes)
