"""The ``question-answering`` contract of Hugging Face's inference API, so that its clients find an endpoint here.

``InferenceClient(base_url).question_answering(...)`` posts to the address as it stands, hence the several paths. While
there is one model, none of them depends on its name, because old code keeps sending the name that it had on the hub.
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
"""Names of `Question`'s fields among `Parameters`."""


_AS_TEXT = {"integer": r"^-?[0-9]{1,9}$", "boolean": "^(true|false|True|False)$"}
"""How a query string writes the values of `Parameters`, by their type."""


def _or_as_text(schema: dict[str, Any]) -> None:
    for each in schema["properties"].values():
        pattern = _AS_TEXT[each["anyOf"][0]["type"]]
        each["anyOf"].append({"type": "string", "pattern": pattern})


def _read(text: str) -> int | bool | str:
    """The value that a text stands for, or the text, which then is refused."""
    if re.fullmatch(_AS_TEXT["integer"], text):
        return int(text)
    return text.lower() == "true" if re.fullmatch(_AS_TEXT["boolean"], text) else text


class Inputs(BaseModel):
    """A question and the text in which to look."""

    model_config = ConfigDict(extra="forbid")

    question: str
    context: str


class Parameters(BaseModel):
    """Options of the ``transformers`` pipeline, with its names and defaults; values may come as strings."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=_or_as_text)

    top_k: int | None = Field(
        default=None, description="Answers wanted; above 1 the response is a list.", ge=1, le=MAX_TOP_K
    )
    doc_stride: int | None = Field(default=None, description="Overlap of neighbouring windows, in tokens.", ge=0)
    max_answer_len: int | None = Field(default=None, description="15 by default.", ge=1, le=LONGEST_ANSWER_TOKENS)
    max_seq_len: int | None = Field(
        default=None, description="Clipped to the engine's shortest and longest windows.", ge=1
    )
    max_question_len: int | None = Field(default=None, description="Question tokens kept; 64 by default.", ge=1)
    handle_impossible_answer: bool | None = Field(default=None, description="Let an empty answer compete.")
    align_to_words: bool | None = Field(default=None, description="True by default.")

    @model_validator(mode="before")
    @classmethod
    def _read_text(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: _read(value) if isinstance(value, str) else value for name, value in values.items()}


class HuggingFaceRequest(BaseModel):
    """``inputs``, or Vertex AI's ``instances``; either with ``parameters``."""

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
        default=None, description="Several; the answer is `{predictions: [...]}`.", fail_fast=True
    )
    parameters: Parameters | None = Field(default=None, description="Without it, those of the query string count.")
    options: dict[str, Any] | None = Field(default=None, description="Of the old hosted API; has no effect here.")


class Span(BaseModel):
    """An answer; the empty one, from 0 to 0, says that there is none."""

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
    """A path with line breaks too, which Starlette's own leaves unfound."""

    regex = "(?s:.*)"


register_url_convertor("any_name", _AnyName())


@router.post(
    "/models/{model_id:any_name}",
    response_model=Answered,
    responses=described(*QUESTIONS, NoSuchModel),
    openapi_extra=DEADLINE_PARAMETER,
)
@router.post("/models/{model_id:any_name}/pipeline/question-answering", include_in_schema=False)  # the first to match
async def question_answering_of_model(body: HuggingFaceRequest, request: Request, model_id: str) -> Reply:
    """The same under a model's name; while there is only one, any name will do."""
    models = services_of(request).pipeline.registry
    if model_id in models:
        return await _answer(body, request, models[model_id])
    if len(models) > 1:
        raise NoSuchModel(f"{model_id:.100}: no such model; there are {', '.join(models.names)}")
    return await _answer(body, request, models[None])


@router.post("/", response_model=Answered, responses=described(*QUESTIONS), openapi_extra=DEADLINE_PARAMETER)
@router.post("/predict", include_in_schema=False)
@router.post("/predict/", include_in_schema=False)
async def question_answering(body: HuggingFaceRequest, request: Request) -> Reply:
    """An object when `top_k` is absent or 1, as the ``transformers`` pipeline has it, else a list."""
    return await _answer(body, request, services_of(request).pipeline.registry[None])


async def _answer(body: HuggingFaceRequest, request: Request, model: ServedModel) -> Reply:
    pipeline = services_of(request).pipeline
    if (body.inputs is None) == (not body.instances):
        raise InvalidArgument(("inputs",), "required; exactly one of `inputs` and `instances` must be given")
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
        for each in results:  # each call into C is a short one
            check()
            written.append(json.dumps(to_answer(each, parameters), ensure_ascii=False, allow_nan=False).encode())
        return written[0] if body.inputs is not None else b'{"predictions": [%b]}' % b", ".join(written)

    size = 200 * sum(len(each.decoded.answers) for each in results) + 2 * sum(each.question.chars for each in results)
    text = await pipeline.workers.run_if_large(size, write, deadline=deadline)
    return Reply(text, results)


def to_question(inputs: Inputs, parameters: Parameters, model: ServedModel, location: Location = ()) -> Question:
    """Translate a request, or the part of one at a location.

    Values that the client gave are kept or refused later; defaults adapt to them.
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
    """Translate a result; never None and never an empty list, which clients take for a malformed response."""
    decoded, top_k = result.decoded, result.question.top_k
    spans = _merged(decoded.answers)
    if parameters.handle_impossible_answer or not spans:
        null = {"answer": "", "score": decoded.null_score, "start": 0, "end": 0}
        # The threshold fitted with the model says whether the empty answer wins; its score, where it ranks if not.
        better = sum(span["score"] >= decoded.null_score for span in spans)
        spans.insert(max(better, 1) if decoded.has_answer else 0, null)
    return spans[0] if top_k == 1 else spans[:top_k]


def _merged(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Merge ranked spans whose texts are the same in lower case, as the pipeline does.

    The first keeps its place in the text and gets the scores of all.
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
        raise InvalidArgument((twice[0],), "stands twice in the query string")
    try:
        return Parameters.model_validate(dict(given))
    except ValidationError as error:
        raise first_problem(error.errors()) from None


def _as_sent(error: InvalidArgument, parameters: Parameters) -> InvalidArgument:
    """Name the field as this API does: an ``overlap`` is ``parameters.doc_stride``, of whichever instance."""
    match error.location:
        case (*place, "contexts") | (*place, "contexts", int()):
            return error.at(*place, "context")
        case (*_, "overlap") if parameters.doc_stride is None:  # then it follows from the length of a window
            return error.at("parameters", "max_seq_len")
        case (*_, str(field)) if field in _PARAMETERS:
            return error.at("parameters", _PARAMETERS[field])
    return error
