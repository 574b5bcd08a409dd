"""A cache around the pipeline: the same question to the same version of a model is computed once.

A cache belongs to one version of a model (`ServedModel.cache`) and goes with it, so that no version ever answers for
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
    """A `Pipeline` that keeps its results; an `Answering`, like that."""

    def __init__(self, pipeline: Pipeline, max_bytes: int, metrics: Metrics) -> None:
        """Wrap a pipeline.

        Args:
            pipeline: computes what is not known.
            max_bytes: of the results kept for each version of a model.
            metrics: counts hits and misses.
        """
        self._pipeline = pipeline
        self._max_bytes = max_bytes
        self._metrics = metrics

    def check_room(self) -> None:
        """As in `Answering`; a busy engine refuses nobody here, for the question may be known."""
        self._pipeline.memory.check()

    async def answer(self, questions: Sequence[Question], *, deadline: float) -> list[Result]:
        """As in `Answering`; computes only questions that are neither known nor being computed."""
        request_context.get().charge("question", len(questions) - 1)  # one was taken when the request came
        call = Call(deadline)
        distinct = list(dict.fromkeys(questions))
        new = [question for question in distinct if not self._values(question.model).has(question)]
        with self._pipeline.memory.account() as account:
            ready = await self._prepare(new, call, account) if len(new) > 1 else {}
            results = await side_by_side([self._find(question, ready.get(question), call) for question in distinct])
        found = dict(zip(distinct, results, strict=True))
        return share_reply([self._counted(found, question) for question in questions])

    async def _prepare(self, new: Sequence[Question], call: Call, account: Account) -> dict[Question, Tokenized]:
        """Admit, validate and tokenize all or none; then each is a computation of its own, for others to join."""
        self._pipeline.admit(new, call)
        validate(new, self._pipeline.settings)
        return dict(zip(new, await self._pipeline.tokenize(new, call, account), strict=True))

    async def _find(self, question: Question, tokenized: Tokenized | None, call: Call) -> Result:
        async def compute() -> Result:
            if tokenized is not None:
                return await self._pipeline.infer_and_decode(tokenized, call)
            shared = [replace(question, location=())]  # each caller who waits has it in another place
            self._pipeline.admit(shared, call)
            return (await self._pipeline.run(shared, call))[0]

        try:
            found, source = await self._values(question.model).get(question, compute, deadline=call.deadline)
        except TimeoutError:
            raise EngineTimeout("The deadline passed before another caller's same question was answered.") from None
        except InvalidArgument as error:
            raise error.within(*question.location) from None
        if source == "hit":
            found = replace(found, tokenize_s=0.0, infer_s=0.0, decode_s=0.0)
        return replace(found, source=source)

    def _counted(self, found: dict[Question, Result], question: Question) -> Result:
        """Return a question's result; the second time in one call, it is shared with the first."""
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
