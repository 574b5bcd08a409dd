"""The path of a question in every API: validate -> tokenize -> infer -> decode.

It knows nothing of HTTP: a `Question` goes in and a `Result` comes out. Errors are `bertqa.errors.InvalidArgument` and
those of `service.triton`.
"""

import asyncio
import time
from collections.abc import Coroutine, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from bertqa.errors import InvalidArgument
from bertqa.spans import Logits, decode
from bertqa.windows import Window, Windows
from service.inference.admission import Call
from service.inference.memory import Account, MemoryBudget
from service.inference.question import Inferred, Question, Result, Tokenized, validate
from service.inference.registry import ModelRegistry, ServedModel
from service.inference.worker_pool import INLINE_S, Check, WorkerPool, go_on, tokenizing_s
from service.observability import tracing
from service.observability.metrics import Metrics
from service.observability.request_context import request_context
from service.settings import Settings
from service.triton.errors import EngineOverloaded, EngineUnavailable

T = TypeVar("T")

MAX_WINDOWS = 4_096
"""Limit on the windows of all questions of a call."""
MAX_SPANS = 16_000_000
"""Limit on the spans ranked for a question: tokens of its contexts times tokens of an answer."""
MAX_ANSWER_BYTES = 1 << 20
"""Limit on the UTF-8 bytes of the answers of a call. Questions get equal shares; low ranks are dropped first."""

_INLINE_SPANS = 24_000  # ranking this many always takes about a millisecond


class Answering(Protocol):
    """Answers questions: a `Pipeline`, or one with a cache around it."""

    def check_room(self) -> None:
        """Check, before a request is read, that it may be accepted.

        The body names the model, so room at any model is enough here; `answer` checks the named model again.

        Raises:
            EngineOverloaded: it would be rejected for every model.
        """
        ...

    async def answer(self, questions: Sequence[Question], *, deadline: float) -> list[Result]:
        """Answer the questions of one call concurrently; if one fails, the call fails.

        Args:
            questions: all are validated and tokenized before the first engine call.
            deadline: in `time.monotonic` seconds.

        Raises:
            InvalidArgument: a question is outside the limits; the location begins with that of the question.
            BundleMismatch: as in `ServedModel.verify`.
            EngineOverloaded: it would wait too long for the engine, or there is not enough memory.
            EngineError: the engine did not answer.
            InvalidLogits: the output of the engine is unusable.
        """
        ...


class Pipeline:
    """Answers questions, each with the model that it names."""

    def __init__(self, registry: ModelRegistry, settings: Settings, metrics: Metrics) -> None:
        self.registry = registry
        self.settings = settings
        self.memory = MemoryBudget(settings.max_memory_mb << 20)
        self.workers = WorkerPool()
        """Threads for long texts: tokenizing, decoding, writing replies."""
        self.body_workers = WorkerPool(1)
        """Thread for parsing large bodies: this takes milliseconds and must not wait for long texts."""
        self._metrics = metrics

    def close(self) -> None:
        """Start no more work."""
        self.workers.close()
        self.body_workers.close()

    async def answer(self, questions: Sequence[Question], *, deadline: float) -> list[Result]:
        """As in `Answering`."""
        request_context.get().charge("question", len(questions) - 1)  # one was charged when the request arrived
        call = Call(deadline)
        self.admit(questions, call)
        return await self.run(questions, call)

    def admit(self, questions: Sequence[Question], call: Call) -> None:
        """Check that a call may begin.

        Raises:
            EngineOverloaded: it would wait too long for the engine, or there is not enough memory.
        """
        self.memory.check(sum(question.bytes for question in questions))
        for model in _models_of(questions):
            model.admission.check(call.deadline, besides=self.workers.abandoned)

    async def run(self, questions: Sequence[Question], call: Call) -> list[Result]:
        """Answer questions that are admitted, or that need no admission."""
        with self.memory.account() as account:
            validate(questions, self.settings)
            tokenized = await self.tokenize(questions, call, account)
            return share_reply(await side_by_side([self.infer_and_decode(each, call) for each in tokenized]))

    async def infer_and_decode(self, tokenized: Tokenized, call: Call) -> Result:
        """Answer one tokenized question."""
        inferred = await self.infer(tokenized, call)
        return await self.decode(inferred, call)

    async def tokenize(self, questions: Sequence[Question], call: Call, account: Account) -> list[Tokenized]:
        """Turn questions into windows, and count the memory of texts and windows on an account."""
        tokenized: list[Tokenized] = []
        windows_left, quick_s = MAX_WINDOWS, INLINE_S
        account.add(sum(question.bytes for question in questions))
        with ExitStack() as arriving:
            for model in _models_of(questions):
                arriving.enter_context(model.admission.arriving())
                if not model.verified:
                    await model.verify(deadline=call.deadline)
            for question in questions:
                cost_s = tokenizing_s(question.question, *question.contexts)
                quick_s -= cost_s
                try:
                    tokenized.append(await self._tokenize(question, cost_s, windows_left, quick_s >= 0, call))
                except InvalidArgument as error:
                    raise error.within(*question.location) from None
                windows_left -= tokenized[-1].windows
                account.add(tokenized[-1].bytes)
        return tokenized

    async def _tokenize(
        self, question: Question, cost_s: float, max_windows: int, is_quick: bool, call: Call
    ) -> Tokenized:
        request_context.get().asked(question.question, question.contexts)
        started = time.perf_counter()
        with tracing.span("tokenize", contexts=len(question.contexts), characters=question.chars):
            if is_quick:
                documents = make_windows(question, max_windows, go_on)
            else:
                self.workers.check(max(min(self.settings.max_wait_s, call.deadline - time.monotonic()), 0))
                documents = await self.workers.run(
                    lambda check: make_windows(question, max_windows, check), deadline=call.deadline
                )
        tokenized = Tokenized(question, documents, time.perf_counter() - started, cost_s)
        if tokenized.tokens * question.max_answer_tokens > MAX_SPANS:
            limit = MAX_SPANS // tokenized.tokens
            raise InvalidArgument(
                ("max_answer_tokens",), f"must be at most {limit} for texts with {tokenized.tokens:,} tokens in total"
            )
        self._metrics.tokenized(tokenized.seconds, tokenized.windows, documents[0].question_truncated)
        identity = question.model.bundle.manifest.identity
        request_context.get().tokenized(identity, tokenized.seconds, tokenized.windows)
        return tokenized

    async def infer(self, tokenized: Tokenized, call: Call) -> Inferred:
        """Get the logits of every window, as the call gets its turns at the engine."""
        model, documents = tokenized.question.model, tokenized.documents
        started = time.perf_counter()
        windows = [window for document in documents for window in document.windows]
        try:
            with tracing.span("infer", calls=True, windows=len(windows), model=model.bundle.manifest.identity):
                flat = iter(await _ask_engine(model, windows, call))
        except EngineUnavailable:
            model.verified = False  # Triton may come back with another engine
            raise
        logits = [[next(flat) for _ in document.windows] for document in documents]
        return Inferred(tokenized, logits, time.perf_counter() - started)

    async def decode(self, inferred: Inferred, call: Call) -> Result:
        """Rank the spans of one question."""
        tokenized, question = inferred.tokenized, inferred.tokenized.question
        started = time.perf_counter()
        is_quick = tokenized.tokens * question.max_answer_tokens <= _INLINE_SPANS and tokenized.cost_s <= INLINE_S
        with tracing.span("decode", top_k=question.top_k):
            if is_quick:
                result = rank(inferred, go_on)
            else:
                result = await self.workers.run(lambda check: rank(inferred, check), deadline=call.deadline)
        result = replace(result, decode_s=time.perf_counter() - started)
        self._metrics.answered(result.infer_s, result.decode_s)
        request_context.get().answered(result.infer_s, result.decode_s)
        question.model.count()
        return result

    def check_room(self) -> None:
        """As in `Answering`."""
        self.memory.check()
        for model in self.registry:
            try:
                return model.admission.check(besides=self.workers.abandoned)
            except EngineOverloaded as error:
                overloaded = error
        raise overloaded

    def expected_wait(self) -> float:
        """Seconds until a new call would get its first turn, at the busiest model."""
        return max(model.admission.expected_wait(self.workers.abandoned) for model in self.registry)


def make_windows(question: Question, max_windows: int, check: Check) -> tuple[Windows, ...]:
    """Tokenize a question with each of its contexts.

    Args:
        question: valid.
        max_windows: limit on the windows of all contexts together.
        check: called between steps of a few milliseconds.

    Raises:
        InvalidArgument: as in `bertqa.windows.WindowTokenizer`, with the field names of `Question`.
    """
    documents: list[Windows] = []
    for number, context in enumerate(question.contexts):
        check()
        try:
            windows = question.model.bundle.tokenizer(
                question.question,
                context,
                overlap=question.overlap,
                max_seq_len=question.max_seq_len,
                max_question_tokens=question.max_question_tokens,
                check=check,
                max_windows=max_windows,
            )
        except InvalidArgument as error:
            raise error.at("contexts", number) if error.location == ("context",) else error from None
        documents.append(windows)
        max_windows -= len(windows.windows)
    return tuple(documents)


def rank(inferred: Inferred, check: Check) -> Result:
    """Rank the spans of one question, and keep as many as a reply may have; ``check`` as in `make_windows`."""
    tokenized, question = inferred.tokenized, inferred.tokenized.question
    decoded = decode(
        tokenized.documents,
        inferred.logits,
        top_k=question.top_k,
        max_answer_tokens=question.max_answer_tokens,
        null_threshold=question.model.bundle.manifest.null_threshold,
        align_to_words=question.align_to_words,
        check=check,
    )
    result = Result(tokenized, inferred.logits, decoded, tokenized.seconds, inferred.seconds, 0.0)
    return result.within(MAX_ANSWER_BYTES)


def share_reply(results: list[Result]) -> list[Result]:
    """Limit the answers of each question of a call to its share of `MAX_ANSWER_BYTES`."""
    return results if len(results) == 1 else [each.within(MAX_ANSWER_BYTES // len(results)) for each in results]


async def side_by_side(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Await all; the first failure, or cancellation, cancels the rest and waits for them to end."""
    if len(work) == 1:  # the common case needs no task
        return [await work[0]]
    tasks = [asyncio.create_task(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def _ask_engine(model: ServedModel, windows: Sequence[Window], call: Call) -> list[Logits]:
    logits: list[Logits] = [None] * len(windows)  # type: ignore[list-item]  # all are set, or an error is raised
    todo = iter(enumerate(windows))

    async def ask() -> None:
        for number, window in todo:  # shared by all
            async with model.admission.slot(call):
                (logits[number],) = await model.engine.predict([window], deadline=call.deadline)

    await side_by_side([ask() for _ in range(min(len(windows), model.admission.slots))])
    return logits


def _models_of(questions: Sequence[Question]) -> Sequence[ServedModel]:
    return (questions[0].model,) if len(questions) == 1 else list({question.model for question in questions})
