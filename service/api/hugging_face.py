"""Routes compatible with ``question-answering`` of Hugging Face's inference API, for its clients.

``InferenceClient(base_url).question_answering(...)`` posts to the given URL, so there are several paths. With a single
model, the name in the path is ignored, because existing code sends the name that the model had on the hub.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeAlias

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.requests import Request

from bertqa.errors import InvalidArgument, Location
from bertqa.spans import Answer
from bertqa.windows import SPECIAL_TOKENS
from service.api.deadline import deadline_of, unless_gone
from service.api.errors import NoSuchModel, first_problem
from service.api.json_body import JsonRoute
from service.api.openapi import DEADLINE_PARAMETER, QUESTIONS, described
from service.api.reply import Reply
from service.api.schemas import LONGEST_ANSWER_TOKENS, MAX_TOP_K
from service.inference.question import Question, Result
from service.inference.registry import ServedModel
from service.inference.worker_pool import Check
from service.services import services_of

MAX_ANSWER_LEN = 15
"""Default answer limit of the ``transformers`` pipeline, in tokens."""

_PARAMETERS = {
    "top_k": "top_k",
    "overlap": "doc_stride",
    "max_answer_tokens": "max_answer_len",
    "max_seq_len": "max_seq_len",
    "max_question_tokens": "max_question_len",
    "align_to_words": "align_to_words",
}
"""Fields of `Question` and their names in `Parameters`."""


_AS_TEXT = {"integer": r"^-?[0-9]{1,9}$", "boolean": "^(true|false|True|False)$"}
"""Query string patterns of the values of `Parameters`, by type."""


def _or_as_text(schema: dict[str, Any]) -> None:
    for each in schema["properties"].values():
        pattern = _AS_TEXT[each["anyOf"][0]["type"]]
        each["anyOf"].append({"type": "string", "pattern": pattern})


def _read(text: str) -> int | bool | str:
    """Convert a text to its value; returns the text, which validation then rejects, if it has none."""
    if re.fullmatch(_AS_TEXT["integer"], text):
        return int(text)
    return text.lower() == "true" if re.fullmatch(_AS_TEXT["boolean"], text) else text


class Inputs(BaseModel):
    """A question and the text to search."""

    model_config = ConfigDict(extra="forbid")

    question: str
    context: str


class Parameters(BaseModel):
    """Options of the ``transformers`` pipeline, with its names and defaults; values may be strings."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=_or_as_text)

    top_k: int | None = Field(
        default=None, description="Number of answers; above 1 the response is a list.", ge=1, le=MAX_TOP_K
    )
    doc_stride: int | None = Field(default=None, description="Overlap of neighbouring windows, in tokens.", ge=0)
    max_answer_len: int | None = Field(
        default=None, description="Longest answer, in tokens; default 15.", ge=1, le=LONGEST_ANSWER_TOKENS
    )
    max_seq_len: int | None = Field(
        default=None, description="Length of a window in tokens; clipped to what the engine supports.", ge=1
    )
    max_question_len: int | None = Field(
        default=None, description="Longest question, in tokens; longer ones are cut. Default 64.", ge=1
    )
    handle_impossible_answer: bool | None = Field(default=None, description="Allow an empty answer.")
    align_to_words: bool | None = Field(default=None, description="Widen answers to whole words; default true.")

    @model_validator(mode="before")
    @classmethod
    def _read_text(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: _read(value) if isinstance(value, str) else value for name, value in values.items()}


class HuggingFaceRequest(BaseModel):
    """``inputs``, or ``instances`` as in Vertex AI, with optional ``parameters``."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "inputs": {"question": "Where was Horovod made?", "context": "Horovod was made at Uber."},
                    "parameters": {"top_k": 1},
                }
            ]
        },
    )

    inputs: Inputs | None = None
    instances: list[Inputs] | None = Field(
        default=None, description="Several inputs; the response is `{predictions: [...]}`.", fail_fast=True
    )
    parameters: Parameters | None = Field(
        default=None, description="If absent, parameters are read from the query string."
    )
    options: dict[str, Any] | None = Field(default=None, description="From the old hosted API; ignored.")


class Span(BaseModel):
    """An answer; an empty span from 0 to 0 means no answer."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"answer": "Uber", "score": 0.93, "start": 20, "end": 24}]}
    )

    answer: str
    score: float
    start: int = Field(description="First code point.")
    end: int = Field(description="One past the last.")


class Predictions(BaseModel):
    """Answers to ``instances``."""

    predictions: list[Span | list[Span]]


Answered: TypeAlias = Span | list[Span] | Predictions

router = APIRouter(route_class=JsonRoute, tags=["Hugging Face compatible"])


class _AnyName(PathConvertor):
    """A path that may contain line breaks, which Starlette's own convertor does not match."""

    regex = "(?s:.*)"


register_url_convertor("any_name", _AnyName())


@router.post(
    "/models/{model_id:any_name}",
    response_model=Answered,
    responses=described(*QUESTIONS, NoSuchModel),
    openapi_extra=DEADLINE_PARAMETER,
)
@router.post("/models/{model_id:any_name}/pipeline/question-answering", include_in_schema=False)  # must match first
async def question_answering_of_model(body: HuggingFaceRequest, request: Request, model_id: str) -> Reply:
    """Answer with the named model; with a single model, any name is accepted."""
    models = services_of(request).pipeline.registry
    if model_id in models:
        return await _answer(body, request, models[model_id])
    if len(models) > 1:
        raise NoSuchModel(f"{model_id:.100}: no such model; the models are {', '.join(models.names)}")
    return await _answer(body, request, models[None])


@router.post("/", response_model=Answered, responses=described(*QUESTIONS), openapi_extra=DEADLINE_PARAMETER)
@router.post("/predict", include_in_schema=False)
@router.post("/predict/", include_in_schema=False)
async def question_answering(body: HuggingFaceRequest, request: Request) -> Reply:
    """Answer questions; the response is an object if `top_k` is absent or 1, else a list, as in ``transformers``."""
    return await _answer(body, request, services_of(request).pipeline.registry[None])


async def _answer(body: HuggingFaceRequest, request: Request, model: ServedModel) -> Reply:
    pipeline = services_of(request).pipeline
    if (body.inputs is None) == (not body.instances):
        raise InvalidArgument(("inputs",), "required; give exactly one of `inputs` and `instances`")
    if len(body.instances or ()) > pipeline.settings.max_questions:
        raise InvalidArgument(("instances",), f"must be at most {pipeline.settings.max_questions}")
    parameters = body.parameters or _of_query(request)
    if body.inputs is not None:
        questions = [to_question(body.inputs, parameters, model, ("inputs",))]
    else:
        questions = [
            to_question(each, parameters, model, ("instances", number))
            for number, each in enumerate(body.instances or ())
        ]
    deadline = deadline_of(request, pipeline.settings.deadline_s)
    try:
        results = await unless_gone(request, services_of(request).answering.answer(questions, deadline=deadline))
    except InvalidArgument as error:
        raise _as_sent(error, parameters) from None

    def write(check: Check) -> bytes:
        written = []
        for each in results:  # one at a time, so that each call into C is short
            check()
            written.append(json.dumps(to_answer(each, parameters), ensure_ascii=False, allow_nan=False).encode())
        return written[0] if body.inputs is not None else b'{"predictions": [%b]}' % b", ".join(written)

    size = 200 * sum(len(each.decoded.answers) for each in results) + 2 * sum(each.question.chars for each in results)
    text = await pipeline.workers.run_if_large(size, write, deadline=deadline)
    return Reply(text, results)


def to_question(inputs: Inputs, parameters: Parameters, model: ServedModel, location: Location = ()) -> Question:
    """Translate a request, or the part of it at a location.

    Values from the client are kept as they are and validated later; defaults adapt to them.
    """
    manifest = model.bundle.manifest
    wanted = parameters.max_seq_len or manifest.max_seq_len
    max_seq_len = min(max(wanted, min(manifest.buckets)), manifest.max_seq_len)
    question_len = parameters.max_question_len or min(manifest.max_question_tokens, max_seq_len // 2)
    room = max_seq_len - question_len - SPECIAL_TOKENS
    doc_stride = parameters.doc_stride
    return Question(
        model=model,
        question=inputs.question,
        contexts=(inputs.context,),
        top_k=parameters.top_k or 1,
        max_answer_tokens=parameters.max_answer_len or MAX_ANSWER_LEN,
        overlap=min(manifest.overlap, max(room // 2, 0)) if doc_stride is None else doc_stride,
        max_seq_len=max_seq_len,
        max_question_tokens=question_len,
        align_to_words=parameters.align_to_words is not False,
        location=location,
    )


def to_answer(result: Result, parameters: Parameters) -> dict[str, Any] | list[dict[str, Any]]:
    """Translate a result; never into None or an empty list, which clients treat as a malformed response."""
    decoded, top_k = result.decoded, result.question.top_k
    spans = _merged(decoded.answers)
    if parameters.handle_impossible_answer or not spans:
        null = {"answer": "", "score": decoded.null_score, "start": 0, "end": 0}
        # The model's threshold decides whether the empty answer comes first; otherwise its score decides its rank.
        better = sum(span["score"] >= decoded.null_score for span in spans)
        spans.insert(max(better, 1) if decoded.has_answer else 0, null)
    return spans[0] if top_k == 1 else spans[:top_k]


def _merged(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Merge ranked spans with the same text in lower case, as the pipeline does.

    The first span keeps its offsets and gets the sum of the scores.
    """
    spans: dict[str, dict[str, Any]] = {}
    for each in answers:
        if span := spans.get(each.text.lower()):
            span["score"] = min(span["score"] + each.score, 1.0)
        else:
            found = {"answer": each.text, "score": each.score, "start": each.start, "end": each.end}
            spans[each.text.lower()] = found
    return sorted(spans.values(), key=lambda span: -span["score"])


def _of_query(request: Request) -> Parameters:
    if not request.scope["query_string"]:
        return Parameters()
    given = request.query_params.multi_items()
    if twice := [name for name, count in Counter(name for name, _ in given).items() if count > 1]:
        raise InvalidArgument((twice[0],), "is repeated in the query string")
    try:
        return Parameters.model_validate(dict(given))
    except ValidationError as error:
        raise first_problem(error.errors()) from None


def _as_sent(error: InvalidArgument, parameters: Parameters) -> InvalidArgument:
    """Use the field names of this API in an error: ``overlap`` becomes ``parameters.doc_stride`` for every instance."""
    match error.location:
        case (*place, "contexts") | (*place, "contexts", int()):
            return error.at(*place, "context")
        case (*_, "overlap") if parameters.doc_stride is None:  # then the length of a window determines it
            return error.at("parameters", "max_seq_len")
        case (*_, str(field)) if field in _PARAMETERS:
            return error.at("parameters", _PARAMETERS[field])
    return error
