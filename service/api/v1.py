"""The service's own API: ``/v1/answer``, ``/v1/answers`` and ``/v1/models``."""

import math
import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from bertqa.errors import InvalidArgument, Location
from bertqa.graphemes import offset_in
from bertqa.manifest import Bundle, Manifest
from bertqa.spans import best_of_each_window
from service.api.deadline import deadline_of, unless_gone
from service.api.json_body import JsonRoute
from service.api.openapi import DEADLINE_PARAMETER, QUESTIONS, described
from service.api.reply import Reply
from service.api.schemas import (
    AnswerItem,
    AnswerRequest,
    AnswerResponse,
    AnswersRequest,
    AnswersResponse,
    ExplainedWindow,
    Explanation,
    ModelItem,
    ModelsResponse,
    Timings,
)
from service.inference.question import Question, Result
from service.inference.registry import ServedModel
from service.inference.worker_pool import Check
from service.services import services_of

_ASKED: dict[str, Any] = {"responses": described(*QUESTIONS), "openapi_extra": DEADLINE_PARAMETER}
router = APIRouter(prefix="/v1", route_class=JsonRoute, tags=["Questions"])


@router.post("/answer", response_model=AnswerResponse, **_ASKED)
async def answer(query: AnswerRequest, request: Request) -> Reply:
    """Find the answer to a question in one text or several."""
    started = time.perf_counter()
    services = services_of(request)
    pipeline = services.pipeline
    deadline = deadline_of(request, services.settings.deadline_s)
    try:
        question = to_question(query, pipeline.registry[query.model])
        (result,) = await unless_gone(request, services_of(request).answering.answer([question], deadline=deadline))
    except InvalidArgument as error:
        raise _as_sent(error, query) from None

    def write(check: Check) -> bytes:
        response = to_response(query, result, check)
        response.timings.total_ms = _ms(time.perf_counter() - started)
        return _dump(response)

    return Reply(await pipeline.workers.run_if_large(_size(query, result), write, deadline=deadline), [result])


@router.post("/answers", response_model=AnswersResponse, **_ASKED)
async def answers(query: AnswersRequest, request: Request) -> Reply:
    """Answer several questions concurrently; if one is invalid or fails, the whole call fails."""
    started = time.perf_counter()
    services = services_of(request)
    pipeline, settings = services.pipeline, services.settings
    if len(query.questions) > settings.max_questions:
        raise InvalidArgument(("questions",), f"must be at most {settings.max_questions}; got {len(query.questions)}")
    deadline = deadline_of(request, settings.deadline_s)
    questions = []
    for number, each in enumerate(query.questions):
        place = ("questions", number)
        try:
            questions.append(to_question(each, pipeline.registry[each.model], place))
        except InvalidArgument as error:
            raise error.within(*place) from None
    try:
        results = await unless_gone(request, services_of(request).answering.answer(questions, deadline=deadline))
    except InvalidArgument as error:
        raise _as_sent(error, query) from None
    pairs = list(zip(query.questions, results, strict=True))

    def write(check: Check) -> bytes:
        written = [
            _dump(to_response(*pair, check)) for pair in pairs
        ]  # one at a time, so that each call into C is short
        timings = _timings(results)
        timings.total_ms = _ms(time.perf_counter() - started)
        return b'{"results":[%b],"timings":%b}' % (b",".join(written), timings.model_dump_json().encode())

    size = sum(_size(*pair) for pair in pairs)
    return Reply(await pipeline.workers.run_if_large(size, write, deadline=deadline), results)


@router.get("/models", response_model=ModelsResponse, responses=described())
async def models(request: Request) -> ModelsResponse:
    """List the models that the ``model`` field may name, with their measurements."""
    found = services_of(request).pipeline.registry
    return ModelsResponse(default=found.default, models=[_item(each.bundle) for each in found])


def _item(bundle: Bundle) -> ModelItem:
    manifest = bundle.manifest
    facts = {name: getattr(manifest, name) for name in ModelItem.model_fields if hasattr(manifest, name)}
    return ModelItem(**{**facts, "name": bundle.model, "checkpoint": manifest.name, "version": bundle.version})


def to_question(query: AnswerRequest, model: ServedModel, location: Location = ()) -> Question:
    """Translate a request, or the part of it at a location."""
    return Question(
        model=model,
        question=query.question,
        contexts=query.texts,
        top_k=query.top_k,
        max_answer_tokens=query.max_answer_tokens,
        overlap=query.overlap,
        location=location,
    )


def to_response(query: AnswerRequest, result: Result, check: Check = lambda: None) -> AnswerResponse:
    """Translate a result, with offsets in the requested unit; ``check`` may end the work."""
    bundle = result.question.model.bundle
    decoded, contexts, unit = result.decoded, result.question.contexts, query.offset_unit
    found = () if query.no_answer and not decoded.has_answer else decoded.answers
    check()
    return AnswerResponse(
        answers=[
            AnswerItem(
                text=each.text,
                score=each.score,
                start=offset_in(contexts[each.context_index], each.start, unit),
                end=offset_in(contexts[each.context_index], each.end, unit),
                context_index=each.context_index,
            )
            for each in found
        ],
        has_answer=decoded.has_answer,
        answers_omitted=result.omitted,
        null_score=decoded.null_score,
        windows=sum(len(document.windows) for document in result.documents),
        question_tokens=result.documents[0].question_tokens,
        truncated=result.documents[0].question_truncated,
        model=bundle.manifest.identity,
        version=bundle.version,
        offset_unit=unit,
        timings=_timings([result]),
        explain=_explain(query, result, bundle.manifest, check) if query.explain else None,
    )


def _explain(query: AnswerRequest, result: Result, manifest: Manifest, check: Check) -> Explanation:
    contexts, unit, margin = result.question.contexts, query.offset_unit, result.decoded.null_margin
    spans = best_of_each_window(result.documents, result.logits, max_answer_tokens=query.max_answer_tokens, check=check)
    return Explanation(
        null_margin=margin if math.isfinite(margin) else None,
        null_threshold=manifest.null_threshold,
        windows=[
            ExplainedWindow(
                context_index=each.context_index,
                first_token=each.first_token,
                tokens=each.tokens,
                start=offset_in(contexts[each.context_index], each.start, unit),
                end=offset_in(contexts[each.context_index], each.end, unit),
                logit=each.logit,
                null_logit=each.null_logit,
            )
            for each in spans
        ],
    )


def _as_sent(error: InvalidArgument, query: AnswerRequest | AnswersRequest) -> InvalidArgument:
    """Name the text of a question ``context`` in an error, if the client used that field."""
    match query, error.location:
        case AnswerRequest(context=str()), ("contexts", *_):
            return error.at("context")
        case AnswersRequest(), ("questions", int(number), *field):
            return _as_sent(error.at(*field), query.questions[number]).within("questions", number)
    return error


def _timings(results: Sequence[Result]) -> Timings:
    stages = {f"{name}_ms": _ms(max(getattr(each, f"{name}_s") for each in results)) for name in _STAGES}
    return Timings(**stages)


_STAGES = ("tokenize", "infer", "decode")


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def _size(query: AnswerRequest, result: Result) -> int:
    """Return a size in bytes that takes as long to write as this result."""
    # Converting offsets takes time by the length of the text, and explaining by the number of windows.
    windows = sum(len(document.windows) for document in result.documents) if query.explain else 0
    return 16 * result.question.chars + 100 * len(result.decoded.answers) + 2_000 * windows


def _dump(response: AnswerResponse) -> bytes:
    """Serialize the answers to one question, without fields that were not requested or are unknown."""
    left_out: dict[str, Any] = {"timings": {"total_ms"}} if response.timings.total_ms is None else {}
    if response.explain is None:
        left_out["explain"] = True
    return response.model_dump_json(exclude=left_out).encode()
