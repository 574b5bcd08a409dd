"""A cache around the pipeline: the same question to the same version of a model is computed only once.

Each version of a model has its own cache (`ServedModel.cache`), which is dropped with it. So no version answers for
another.
"""

from collections.abc import Sequence
from dataclasses import replace

from bertqa.errors import InvalidArgument
from service.inference.admission import Call
from service.inference.memory import Account
from service.inference.pipeline import Pipeline, share_reply, side_by_side
from service.inference.question import Question, Result, Tokenized, validate
from service.inference.registry import ServedModel
from service.inference.shared_values import SharedValues
from service.observability.metrics import Metrics
from service.observability.request_context import request_context
from service.triton.errors import EngineTimeout


class CachedPipeline:
    """An `Answering` that wraps a `Pipeline` and keeps its results."""

    def __init__(self, pipeline: Pipeline, max_bytes: int, metrics: Metrics) -> None:
        """Wrap a pipeline.

        Args:
            pipeline: computes results that are not cached.
            max_bytes: limit on the results kept for each version of a model.
            metrics: counts hits and misses.
        """
        self._pipeline = pipeline
        self._max_bytes = max_bytes
        self._metrics = metrics

    def check_room(self) -> None:
        """As in `Answering`; a busy engine is no reason to reject, because the answer may be cached."""
        self._pipeline.memory.check()

    async def answer(self, questions: Sequence[Question], *, deadline: float) -> list[Result]:
        """As in `Answering`; computes only questions that are neither cached nor being computed."""
        request_context.get().charge("question", len(questions) - 1)  # one was charged when the request arrived
        call = Call(deadline)
        distinct = list(dict.fromkeys(questions))
        new = [question for question in distinct if not self._values(question.model).has(question)]
        with self._pipeline.memory.account() as account:
            ready = await self._prepare(new, call, account) if len(new) > 1 else {}
            results = await side_by_side([self._find(question, ready.get(question), call) for question in distinct])
        found = dict(zip(distinct, results, strict=True))
        return share_reply([self._counted(found, question) for question in questions])

    async def _prepare(self, new: Sequence[Question], call: Call, account: Account) -> dict[Question, Tokenized]:
        """Admit, validate and tokenize all questions or none; then other callers can join each computation."""
        self._pipeline.admit(new, call)
        validate(new, self._pipeline.settings)
        return dict(zip(new, await self._pipeline.tokenize(new, call, account), strict=True))

    async def _find(self, question: Question, tokenized: Tokenized | None, call: Call) -> Result:
        async def compute() -> Result:
            if tokenized is not None:
                return await self._pipeline.infer_and_decode(tokenized, call)
            shared = [replace(question, location=())]  # it differs between the waiting callers
            self._pipeline.admit(shared, call)
            return (await self._pipeline.run(shared, call))[0]

        try:
            found, source = await self._values(question.model).get(question, compute, deadline=call.deadline)
        except TimeoutError:
            raise EngineTimeout(
                "The deadline passed before the same question of another request was answered."
            ) from None
        except InvalidArgument as error:
            raise error.within(*question.location) from None
        if source == "hit":
            found = replace(found, tokenize_s=0.0, infer_s=0.0, decode_s=0.0)
        return replace(found, source=source)

    def _counted(self, found: dict[Question, Result], question: Question) -> Result:
        """Return a question's result; a repeated question in one call shares it."""
        result = found[question]
        if result.source == "miss":
            found[question] = replace(result, source="coalesced")
        assert result.source
        kept = [each.cache for each in self._pipeline.registry if each.cache]
        self._metrics.looked_up(result.source, entries=sum(map(len, kept)), held_bytes=sum(each.bytes for each in kept))
        return result

    def _values(self, model: ServedModel) -> SharedValues[Result]:
        if model.cache is None:
            model.cache = SharedValues(self._max_bytes, lambda result: result.bytes)
        return model.cache
