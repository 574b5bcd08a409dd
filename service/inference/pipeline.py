"""The path of a question, whichever API it came through: tokens -> engine -> ranked spans.

Knows no HTTP: a `Question` goes in, a `Result` comes out, and errors are those of `service.api.errors` and
`service.triton.errors`.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, TypeVar

from bertqa.errors import InvalidArgument, Location
from bertqa.spans import Logits, decode
from bertqa.windows import Window, Windows
from service.inference.admission import Call
from service.inference.cache import Cache
from service.inference.memory import Account, MemoryBudget
from service.inference.question import Question, Result, Tokenized
from service.inference.registry import Models, Served
from service.inference.worker_pool import INLINE_S, Check, WorkerPool, tokenizing_s
from service.observability import tracing
from service.observability.metrics import Metrics
from service.observability.request_context import current_record
from service.settings import Settings
from service.triton.errors import ModelOverloaded, ModelTimeout, ModelUnavailable

T = TypeVar("T")

MAX_WINDOWS = 4_096
"""Windows that the questions of one call may come to."""
MAX_SPANS = 16_000_000
"""Spans ranked for one question: tokens of its contexts times tokens of an answer."""
MAX_ANSWER_BYTES = 1 << 20
"""UTF-8 bytes of the answers of one call together. Its questions have equal shares; lower ranks are left out first."""
EVIDENCE_S = 1.0
"""Seconds for which an engine call that succeeded proves that the engine answers."""

_INLINE_SPANS = 24_000  # as many are ranked in about a millisecond, whatever they are
_INLINE_BYTES = 64 * 1024  # as many are written in less than a millisecond


class Answerer:
    """Answers questions, each with the model that it is put to."""

    def __init__(self, models: Models, settings: Settings, metrics: Metrics) -> None:
        self.models = models
        self.settings = settings
        self.metrics = metrics
        self.memory = MemoryBudget(settings.max_memory_mb << 20)
        self._pool = WorkerPool()

    def close(self) -> None:
        """Begin no more work."""
        self._pool.close()

    async def is_ready(self, model: Served, patience_s: float) -> None:
        """Return if a model answers, as the latest probe found; at most one a second is made, whoever asks.

        Raises:
            Exception: as `check_ready`, with a deadline so many seconds from now.
        """
        await model.readiness.ask(lambda: self.check_ready(model, time.monotonic() + patience_s))

    async def check_ready(self, model: Served, deadline: float) -> None:
        """Compare the engine with its bundle, and see it answer: a call of the last moment, or a question of our own.

        Raises:
            BundleMismatch: as in `Served.verify`.
            ModelError: the engine does not answer.
            InvalidLogits: it answers nonsense.
        """
        try:
            await model.admin.check_ready(deadline=deadline)
            await model.compare(deadline=deadline)  # a probe is the moment to notice that Triton has another loaded
        except ModelUnavailable:
            model.verified = False  # it may come back as another
            raise
        evidence_s = max(EVIDENCE_S, 2 * model.admission.call_s)
        if time.monotonic() > model.admission.answered_at + evidence_s:
            asked = Question(model=model, question="Is it ready?", contexts=("It is ready.",))
            await self._answer([asked], Call(deadline))  # never refused: a busy engine is ready

    def check_room(self) -> None:
        """Return if a request of which nothing has been read yet has a chance.

        Raises:
            ModelOverloaded: it would be refused, whichever model it asks.
        """
        self.memory.check()
        if self.settings.cache_mb:
            return  # it may ask what is known
        for model in self.models:
            try:
                return model.admission.check(besides=self._pool.abandoned)
            except ModelOverloaded as error:
                overloaded = error
        raise overloaded

    def expected_wait(self) -> float:
        """Seconds until a call that comes now would have its first turn, at the model that is busiest."""
        return max(model.admission.expected_wait(self._pool.abandoned) for model in self.models)

    async def answer(self, question: Question, *, deadline: float) -> Result:
        """Answer one question; arguments and errors as in `answer_all`."""
        return (await self.answer_all([question], deadline=deadline))[0]

    async def answer_all(self, questions: Sequence[Question], *, deadline: float) -> list[Result]:
        """Answer the questions of one call side by side, all or none.

        Args:
            questions: all are checked and tokenized before the engine hears of any.
            deadline: `time.monotonic` seconds.

        Raises:
            InvalidArgument: a question is outside the limits; its location ends with a field of `Question`.
            BundleMismatch: as in `Served.verify`.
            ModelOverloaded: it would have to wait too long for the engine, or there is no memory for it.
            ModelError: the engine did not answer.
            InvalidLogits: it answered nonsense.
        """
        call = Call(deadline)
        current_record.get().charge("question", len(questions) - 1)  # one was taken when the request came
        if self.settings.cache_mb:
            results = await self._known_or_new(questions, call)
        else:
            self._check_room(questions, call)
            results = await self._answer(questions, call)
        return results if len(results) == 1 else [each.within(MAX_ANSWER_BYTES // len(results)) for each in results]

    async def off_loop(self, size: int, work: Callable[[Check], T], *, deadline: float) -> T:
        """Make something of results, their reply for one: at once if that takes as long as few bytes, else in a thread.

        Raises:
            ModelTimeout: the deadline, in `time.monotonic` seconds, passed first.
        """
        return work(_no_check) if size < _INLINE_BYTES else await self._pool.run(work, deadline=deadline)

    async def _known_or_new(self, questions: Sequence[Question], call: Call) -> list[Result]:
        """Compute only what is neither known nor being computed, and what stands twice among the questions once."""
        places: dict[Question, int] = {}
        for number, question in enumerate(questions):
            places.setdefault(question, number)
        ready: dict[Question, Tokenized] = {}
        new = [question for question in places if not self._cache_of(question.model).has(question)]
        with self.memory.account() as account:
            if len(new) > 1:
                # All or none are admitted and valid; then each is a computation of its own, for others to join.
                self._check_room(new, call)
                tokenized = await self._prepare(new, call, account)
                ready = dict(zip(new, tokenized, strict=True))
            work = [self._look_up(question, ready.get(question), call) for question in places]
            found = dict(zip(places, [await work[0]] if len(work) == 1 else await side_by_side(work), strict=True))
        results = []
        for number, question in enumerate(questions):
            result = found[question]
            again = number != places[question] and result.source == "miss"
            results.append(replace(result, source="coalesced") if again else result)
        caches = [each.cache for each in self.models if each.cache]
        for result in results:
            if result.source:
                self.metrics.looked_up(result.source, caches)
        return results

    async def _look_up(self, question: Question, tokenized: Tokenized | None, call: Call) -> Result:
        async def compute() -> Result:
            if tokenized is None:
                self._check_room([question], call)
                return (await self._answer([replace(question, location=())], call))[0]  # for whoever joins
            return await self._infer(tokenized, call)

        try:
            found: Result
            found, source = await self._cache_of(question.model).get(question, compute, deadline=call.deadline)
        except TimeoutError:
            raise ModelTimeout("The deadline passed before somebody else's same question was answered.") from None
        except InvalidArgument as error:
            raise error.within(*question.location) from None
        if source == "hit":
            found = replace(found, tokenize_s=0.0, infer_s=0.0, decode_s=0.0)
        return replace(found, source=source)

    def _cache_of(self, model: Served) -> Cache[Result]:
        if model.cache is None:
            model.cache = Cache(self.settings.cache_mb << 20, lambda result: result.bytes)
        return model.cache

    def _check_room(self, questions: Sequence[Question], call: Call) -> None:
        self.memory.check(sum(question.chars for question in questions))
        for model in {question.model for question in questions}:
            model.admission.check(call.deadline, besides=self._pool.abandoned)

    async def _answer(self, questions: Sequence[Question], call: Call) -> list[Result]:
        with self.memory.account() as account:
            tokenized = await self._prepare(questions, call, account)
            if len(tokenized) == 1:
                return [await self._infer(tokenized[0], call)]
            return await side_by_side([self._infer(each, call) for each in tokenized])

    async def _prepare(self, questions: Sequence[Question], call: Call, account: Account) -> list[Tokenized]:
        """Tokenize all before the engine hears of any."""
        tokenized: list[Tokenized] = []
        room, quick_s = MAX_WINDOWS, INLINE_S
        with ExitStack() as arriving:
            for model in {question.model for question in questions}:
                arriving.enter_context(model.admission.arriving())
                await model.verify(deadline=call.deadline)
            for question in questions:
                quick_s -= tokenizing_s(question.question, *question.contexts)
                try:
                    tokenized.append(await self._tokenize(question, room, quick_s >= 0, call))
                except InvalidArgument as error:
                    raise error.within(*question.location) from None
                room -= tokenized[-1].windows
                account.add(tokenized[-1].bytes)
        return tokenized

    async def _tokenize(self, question: Question, max_windows: int, is_quick: bool, call: Call) -> Tokenized:
        current_record.get().asked(question.question, question.contexts)
        self._check(question)
        started = time.perf_counter()

        def make(check: Check) -> tuple[Windows, ...]:
            return self._make_windows(question, max_windows, check)

        with tracing.span("tokenize", contexts=len(question.contexts), characters=question.chars):
            if is_quick:
                documents = make(_no_check)
            else:
                self._pool.check(max(min(self.settings.max_wait_s, call.deadline - time.monotonic()), 0))
                documents = await self._pool.run(make, deadline=call.deadline)
        tokenized = Tokenized(question, documents, time.perf_counter() - started)
        if tokenized.tokens * question.max_answer_tokens > MAX_SPANS:
            limit = MAX_SPANS // tokenized.tokens
            raise InvalidArgument(
                ("max_answer_tokens",), f"must be at most {limit} for texts of {tokenized.tokens:,} tokens together"
            )
        self.metrics.tokenized(tokenized.seconds, tokenized.windows, documents[0].question_truncated)
        identity = question.model.bundle.manifest.identity
        current_record.get().tokenized(identity, tokenized.seconds, tokenized.windows)
        return tokenized

    def _make_windows(self, question: Question, max_windows: int, check: Check) -> tuple[Windows, ...]:
        documents: list[Windows] = []
        for number, context in enumerate(question.contexts):
            check()
            try:
                documents.append(
                    question.model.bundle.maker(
                        question.question,
                        context,
                        overlap=question.overlap,
                        max_seq_len=question.max_seq_len,
                        max_question_tokens=question.max_question_tokens,
                        check=check,
                        max_windows=max_windows,
                    )
                )
            except InvalidArgument as error:
                raise error.at("contexts", number) if error.location == ("context",) else error from None
            max_windows -= len(documents[-1].windows)
        return tuple(documents)

    async def _infer(self, tokenized: Tokenized, call: Call) -> Result:
        question, documents = tokenized.question, tokenized.documents
        model = question.model
        started = time.perf_counter()
        windows = [window for document in documents for window in document.windows]
        try:
            with tracing.span("infer", calls=True, windows=len(windows), model=model.bundle.manifest.identity):
                flat = iter(await self._ask_engine(model, windows, call))
        except ModelUnavailable:
            model.verified = False  # it may come back as another
            raise
        logits = [[next(flat) for _ in document.windows] for document in documents]
        inferred = time.perf_counter()

        def rank(check: Check) -> Result:
            decoded = decode(
                documents,
                logits,
                top_k=question.top_k,
                max_answer_tokens=question.max_answer_tokens,
                null_threshold=model.bundle.manifest.null_threshold,
                align_to_words=question.align_to_words,
                check=check,
            )
            return Result(tokenized, logits, decoded, tokenized.seconds, 0.0, 0.0).within(MAX_ANSWER_BYTES)

        is_quick = tokenized.tokens * question.max_answer_tokens <= _INLINE_SPANS
        is_quick = is_quick and tokenizing_s(*question.contexts) <= INLINE_S
        with tracing.span("decode", top_k=question.top_k):
            result = rank(_no_check) if is_quick else await self._pool.run(rank, deadline=call.deadline)
        ended = time.perf_counter()
        self.metrics.answered(inferred - started, ended - inferred)
        current_record.get().answered(inferred - started, ended - inferred)
        model.count()
        return replace(result, infer_s=inferred - started, decode_s=ended - inferred)

    async def _ask_engine(self, model: Served, windows: Sequence[Window], call: Call) -> list[Logits]:
        """The logits of each window, asked for as the call's turns come."""
        logits: list[Logits] = [None] * len(windows)  # type: ignore[list-item]  # all are set, or an error is raised
        todo = iter(enumerate(windows))

        async def ask() -> None:
            for number, window in todo:  # shared by all
                async with model.admission.slot(call):
                    (logits[number],) = await model.engine.predict([window], deadline=call.deadline)

        if len(windows) == 1:  # the common case needs no task
            await ask()
        else:
            await side_by_side([ask() for _ in range(min(len(windows), model.admission.slots))])
        return logits

    def _check(self, question: Question) -> None:
        """Hold a question against the limits, before anything is made of it."""
        settings = self.settings
        if len(question.question) > settings.max_question_chars:
            raise _too_many(("question",), settings.max_question_chars, "characters", len(question.question))
        if len(question.contexts) > settings.max_contexts:
            raise _too_many(("contexts",), settings.max_contexts, "texts", len(question.contexts))
        chars = question.chars
        if chars > settings.max_context_chars:
            raise _too_many(("contexts",), settings.max_context_chars, "characters together", chars)
        if not question.question or question.question.isspace():
            raise InvalidArgument(("question",), _EMPTY)
        for number, context in enumerate(question.contexts):
            if not context or context.isspace():
                raise InvalidArgument(("contexts", number), _EMPTY)


_EMPTY = "must hold more than white space"


def _too_many(location: Location, limit: int, unit: str, got: int) -> InvalidArgument:
    return InvalidArgument(location, f"must be at most {limit:,} {unit}; got {got:,}")


def _no_check() -> None:
    """Let work go on to its end."""


async def side_by_side(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Await all; the first failure, or our own cancellation, cancels the rest and waits until they are gone."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
