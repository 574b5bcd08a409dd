"""The path of a question, whichever API it came through: tokens -> engine -> ranked spans.

Knows no HTTP: a `Question` goes in, a `Result` comes out, and errors are those of `service.errors` and
`service.triton`.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from sys import getsizeof
from typing import Any, TypeVar

from numpy.typing import NDArray

from bertqa.spans import MAX_ANSWER_TOKENS, Decoded, Logits, decode
from bertqa.windows import SPECIAL_TOKENS, Windows
from service import tracing
from service.cache import Cache, Source
from service.errors import InvalidField
from service.metrics import Metrics
from service.models import Models, Served
from service.record import current_record
from service.settings import Settings
from service.triton import ModelOverloaded, ModelTimeout, ModelUnavailable

T = TypeVar("T")

INLINE_CHARS = 4_000
"""Up to so many characters, tokenizing and decoding take well under a millisecond or two: a thread would cost more."""
MAX_WINDOWS = 4_096
"""Windows that a question may come to at worst."""
MAX_SPANS = 16_000_000
"""Spans ranked for one question: tokens of its contexts times tokens of an answer, four bytes each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked, and of whom; None stands for the model's own value. Field names are those that errors give."""

    model: Served
    question: str
    contexts: tuple[str, ...]
    top_k: int = 1
    max_answer_tokens: int = MAX_ANSWER_TOKENS
    overlap: int | None = None  # tokens
    max_seq_len: int | None = None  # tokens
    max_question_tokens: int | None = None
    align_to_words: bool = True

    @property
    def chars(self) -> int:
        """Characters of all contexts."""
        return sum(map(len, self.contexts))


@dataclass(frozen=True, slots=True)
class Tokenized:
    """A question ready for the engine."""

    question: Question
    documents: tuple[Windows, ...]  # one for each context
    seconds: float

    @property
    def windows(self) -> int:
        """Engine calls that the question needs."""
        return sum(len(document.windows) for document in self.documents)


@dataclass(frozen=True, slots=True)
class Result:
    """A question answered."""

    question: Question
    documents: tuple[Windows, ...]
    logits: Sequence[Sequence[Logits]]  # for each document, of each of its windows
    decoded: Decoded
    tokenize_s: float
    infer_s: float
    decode_s: float
    source: Source | None = None  # None without a cache

    @property
    def bytes(self) -> int:
        """Memory that it takes up, within a tenth or so: texts, arrays, and a kilobyte of objects for each window."""
        asked = self.question
        arrays: list[NDArray[Any]] = [array for pairs in self.logits for pair in pairs for array in pair]
        for each in self.documents:
            arrays += [each.starts, each.ends, each.words]
            arrays += [array for window in each.windows for array in window.tensors().values()]
        texts = (asked.question, *asked.contexts)
        windows = sum(len(each.windows) for each in self.documents)
        return sum(map(getsizeof, texts)) + sum(array.nbytes for array in arrays) + 2048 + 1024 * windows


class Answerer:
    """Answers questions, each with the model that it is put to."""

    def __init__(self, models: Models, settings: Settings, metrics: Metrics) -> None:
        self.models = models
        self.settings = settings
        self.metrics = metrics
        self._in_progress = 0
        self._longest_wait_s = settings.max_queue_ms / 1000

    async def check_ready(self, model: Served, deadline: float) -> None:
        """Send a real question through tokenizer, engine and decoder.

        Raises:
            BundleMismatch: as in `Served.verify`.
            ModelError: the engine does not answer.
            InvalidLogits: it answers nonsense.
        """
        model.verified = False  # a probe is the moment to notice that Triton has loaded something else
        await model.engine.check_ready(deadline=deadline)
        asked = Question(model=model, question="Is it ready?", contexts=("It is ready.",))
        await self._answer_all([asked], deadline)  # a busy engine is ready

    def check_room(self) -> None:
        """Return if a request of which nothing has been read yet has a chance.

        Raises:
            ModelOverloaded: it would be refused, whichever model it asks.
        """
        if self.settings.cache_mb:
            return  # it may ask what is known
        for model in self.models:
            try:
                return model.check_room(self._longest_wait_s)
            except ModelOverloaded as error:
                overloaded = error
        raise overloaded

    async def answer(self, question: Question, *, deadline: float) -> Result:
        """Answer one question; arguments and errors as in `answer_all`, but fields are named without their place."""
        try:
            return (await self.answer_all([question], deadline=deadline))[0]
        except InvalidField as error:
            raise InvalidField(error.field.removeprefix("questions[0]."), error.problem) from None

    async def answer_all(self, questions: Sequence[Question], *, deadline: float) -> list[Result]:
        """Answer questions side by side, all or none.

        Args:
            questions: all are checked and tokenized before the engine hears of any.
            deadline: `time.monotonic` seconds.

        Raises:
            InvalidField: a question is outside the limits; ``questions[i].`` and a field of `Question` are named.
            BundleMismatch: as in `Served.verify`.
            ModelOverloaded: it would have to wait too long for the engine, or too many are in progress.
            ModelError: the engine did not answer.
            InvalidLogits: it answered nonsense.
        """
        if self.settings.cache_mb:
            return await self._known_or_new(questions, deadline)
        return await self._admit(questions, deadline)

    async def _known_or_new(self, questions: Sequence[Question], deadline: float) -> list[Result]:
        """Compute only what is neither kept nor being computed, and what stands twice among the questions once."""
        places: dict[Question, int] = {}
        for number, question in enumerate(questions):
            places.setdefault(question, number)
        ready: dict[Question, Tokenized] = {}
        new = [question for question in places if not self._cache_of(question.model).has(question)]
        if len(new) > 1:
            # All or none are admitted and valid; then each is a computation of its own, for others to join.
            self._check_room(new, deadline)
            with self._in_work(new):
                tokenized = await self._prepare(new, [places[question] for question in new], deadline)
            ready = dict(zip(new, tokenized, strict=True))
        work = [self._look_up(question, place, ready.get(question), deadline) for question, place in places.items()]
        found = dict(zip(places, [await work[0]] if len(work) == 1 else await side_by_side(work), strict=True))
        results = []
        for number, question in enumerate(questions):
            result = found[question]
            again = number != places[question] and result.source == "computed"
            results.append(replace(result, source="shared") if again else result)
        kept = [each.cache for each in self.models if each.cache]
        for result in results:
            if result.source:
                self.metrics.looked_up(result.source, kept)
        return results

    async def _look_up(self, question: Question, place: int, tokenized: Tokenized | None, deadline: float) -> Result:
        async def compute() -> Result:
            if tokenized is None:
                return (await self._admit([question], deadline))[0]
            with self._in_work([question]):
                return await self._infer(tokenized, deadline)

        try:
            found: Result
            found, source = await self._cache_of(question.model).get(question, compute, deadline=deadline)
        except TimeoutError:
            raise ModelTimeout("The deadline passed before somebody else's same question was answered.") from None
        except InvalidField as error:  # perhaps of somebody who asked it in another place
            field = error.field.removeprefix("questions[0].")
            raise InvalidField(field, error.problem).inside(f"questions[{place}]") from None
        if source == "kept":
            found = replace(found, tokenize_s=0.0, infer_s=0.0, decode_s=0.0)
        return replace(found, source=source)

    def _cache_of(self, model: Served) -> Cache[Result]:
        if model.cache is None:
            model.cache = Cache(self.settings.cache_mb << 20, lambda result: result.bytes)
        return model.cache

    async def _admit(self, questions: Sequence[Question], deadline: float) -> list[Result]:
        self._check_room(questions, deadline)
        return await self._answer_all(questions, deadline)

    def _check_room(self, questions: Sequence[Question], deadline: float) -> None:
        if self._in_progress and self._in_progress + len(questions) > self.settings.max_in_progress:
            limit = self.settings.max_in_progress
            raise ModelOverloaded(f"{self._in_progress} questions are in progress, and {limit} may be.")
        patience_s = deadline - time.monotonic()
        for model in {question.model for question in questions}:
            model.check_room(self._longest_wait_s, patience_s=patience_s)

    async def _answer_all(self, questions: Sequence[Question], deadline: float) -> list[Result]:
        with self._in_work(questions):
            tokenized = await self._prepare(questions, range(len(questions)), deadline)
            if len(tokenized) == 1:
                return [await self._infer(tokenized[0], deadline)]
            return await side_by_side([self._infer(each, deadline) for each in tokenized])

    @contextmanager
    def _in_work(self, questions: Sequence[Question]) -> Iterator[None]:
        """Count questions among those in progress."""
        self._in_progress += len(questions)
        for question in questions:
            question.model.in_progress += 1
        try:
            yield
        finally:
            self._in_progress -= len(questions)
            for question in questions:
                question.model.in_progress -= 1

    async def _prepare(self, questions: Sequence[Question], places: Sequence[int], deadline: float) -> list[Tokenized]:
        """Tokenize all before the engine hears of any; ``places`` are theirs among all that were asked."""
        for model in {question.model for question in questions}:
            await model.verify(deadline=deadline)
        tokenized = []
        for question, place in zip(questions, places, strict=True):
            try:
                tokenized.append(await self._tokenize(question))
            except InvalidField as error:
                raise error.inside(f"questions[{place}]") from None
        return tokenized

    async def _tokenize(self, question: Question) -> Tokenized:
        current_record.get().asked(question.question, question.contexts)
        self._check(question)
        started = time.perf_counter()
        with tracing.span("tokenize", contexts=len(question.contexts), characters=question.chars):
            documents = await off_loop(question.chars, lambda: self._make_windows(question))
        tokens = sum(len(document.starts) for document in documents)
        if tokens * question.max_answer_tokens > MAX_SPANS:
            limit = MAX_SPANS // tokens
            raise InvalidField("max_answer_tokens", f"must be at most {limit} for texts of {tokens:,} tokens together")
        tokenized = Tokenized(question, documents, time.perf_counter() - started)
        self.metrics.tokenized(tokenized.seconds, tokenized.windows, documents[0].question_truncated)
        identity = question.model.bundle.manifest.identity
        current_record.get().tokenized(identity, tokenized.seconds, tokenized.windows)
        return tokenized

    def _make_windows(self, question: Question) -> tuple[Windows, ...]:
        documents = []
        for number, context in enumerate(question.contexts):
            try:
                documents.append(
                    question.model.bundle.maker(
                        question.question,
                        context,
                        overlap=question.overlap,
                        max_seq_len=question.max_seq_len,
                        max_question_tokens=question.max_question_tokens,
                    )
                )
            except ValueError as error:
                raise InvalidField.from_value_error(error).renamed({"context": f"contexts[{number}]"}) from None
        return tuple(documents)

    async def _infer(self, tokenized: Tokenized, deadline: float) -> Result:
        question, documents = tokenized.question, tokenized.documents
        model = question.model
        started = time.perf_counter()
        windows = [window for document in documents for window in document.windows]
        try:
            with tracing.span("infer", calls=True, windows=len(windows), model=model.bundle.manifest.identity):
                flat = iter(await model.engine.predict(windows, deadline=deadline) if windows else [])
        except ModelUnavailable:
            model.verified = False  # it may come back as another
            raise
        logits = [[next(flat) for _ in document.windows] for document in documents]
        inferred = time.perf_counter()
        with tracing.span("decode", top_k=question.top_k):
            decoded = await off_loop(
                question.chars,
                lambda: decode(
                    documents,
                    logits,
                    top_k=question.top_k,
                    max_answer_tokens=question.max_answer_tokens,
                    null_threshold=model.bundle.manifest.null_threshold,
                    align_to_words=question.align_to_words,
                ),
            )
        ended = time.perf_counter()
        self.metrics.answered(inferred - started, ended - inferred)
        current_record.get().answered(inferred - started, ended - inferred)
        model.count()
        return Result(question, documents, logits, decoded, tokenized.seconds, inferred - started, ended - inferred)

    def _check(self, question: Question) -> None:
        """Hold a question against the limits, before anything is made of it."""
        settings = self.settings
        if len(question.question) > settings.max_question_chars:
            raise _too_many("question", settings.max_question_chars, "characters", len(question.question))
        if len(question.contexts) > settings.max_contexts:
            raise _too_many("contexts", settings.max_contexts, "texts", len(question.contexts))
        chars = question.chars
        if chars > settings.max_context_chars:
            raise _too_many("contexts", settings.max_context_chars, "characters together", chars)
        for field, text in (("question", question.question), *_numbered(question.contexts)):
            if not text or text.isspace():
                raise InvalidField(field, "must hold more than white space")
        # A window advances by at least so many tokens, and a text rarely has more tokens than characters.
        manifest = question.model.bundle.manifest
        room = (question.max_seq_len or manifest.max_seq_len) - SPECIAL_TOKENS
        room -= question.max_question_tokens or manifest.max_question_tokens
        step = room - (min(manifest.overlap, room // 2) if question.overlap is None else question.overlap)
        if chars > MAX_WINDOWS * max(step, 1):
            field = "contexts" if question.overlap is None else "overlap"
            raise InvalidField(
                field, f"{chars:,} characters could come to over {MAX_WINDOWS:,} windows, the most there may be"
            )


def _numbered(contexts: Sequence[str]) -> list[tuple[str, str]]:
    return [(f"contexts[{number}]", context) for number, context in enumerate(contexts)]


def _too_many(field: str, limit: int, unit: str, got: int) -> InvalidField:
    return InvalidField(field, f"must be at most {limit:,} {unit}; got {got:,}")


async def off_loop(chars: int, work: Callable[[], T]) -> T:
    """Run work on texts of so many characters: at once if they are short, else in a thread."""
    return work() if chars <= INLINE_CHARS else await asyncio.to_thread(work)


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
