"""The JSON of ``/v1``: requests, responses and errors, with the limits and examples that ``/docs`` shows."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from bertqa.errors import InvalidArgument
from bertqa.graphemes import OffsetUnit
from bertqa.spans import MAX_ANSWER_TOKENS

MAX_TOP_K = 100
LONGEST_ANSWER_TOKENS = 200

_PASSAGE = "Horovod was made at Uber. Its authors are Alexander Sergeev and Mike Del Balso."
_ASKED: dict[str, Any] = {"question": "Who made Horovod?", "context": _PASSAGE}
_ANSWER: dict[str, Any] = {
    "text": "Alexander Sergeev and Mike Del Balso",
    "score": 0.71,
    "start": 42,
    "end": 78,
    "context_index": 0,
}
_TIMINGS: dict[str, Any] = {"tokenize_ms": 0.2, "infer_ms": 6.4, "decode_ms": 0.3, "total_ms": 7.0}
_ANSWERED: dict[str, Any] = {
    "answers": [_ANSWER],
    "has_answer": True,
    "answers_omitted": 0,
    "null_score": 0.04,
    "windows": 1,
    "question_tokens": 7,
    "truncated": False,
    "model": "minilm-squad-cpu-int8-0123456789ab",
    "version": 1,
    "offset_unit": "codepoint",
    "timings": _TIMINGS,
}


def _example(*examples: dict[str, Any]) -> ConfigDict:
    # The examples of a schema; unknown fields are refused, and numbers are never made of strings or booleans.
    return ConfigDict(extra="forbid", strict=True, frozen=True, json_schema_extra={"examples": list(examples)})


class AnswerRequest(BaseModel):
    """A question, and the one text or the several texts in which to look for the answer."""

    model_config = _example(
        _ASKED,
        {
            "question": "어디에서 만들었나요?",
            "contexts": ["Horovod는 Uber에서 만들었다.", "Triton은 NVIDIA에서 만들었다."],
            "top_k": 3,
            "no_answer": True,
            "offset_unit": "utf16",
        },
    )

    question: str = Field(description="The question; by default at most 1,000 characters, see `/info`.", min_length=1)
    context: str | None = Field(
        default=None,
        description="The text; by default at most 200,000 characters. Either this or `contexts`.",
        min_length=1,
    )
    contexts: list[Annotated[str, Field(min_length=1)]] | None = Field(
        default=None,
        description="Several texts, ranked together: by default at most 64, together at most 200,000 characters.",
        min_length=1,
        fail_fast=True,
    )
    top_k: int = Field(default=1, description="How many distinct spans are wanted.", ge=1, le=MAX_TOP_K)
    max_answer_tokens: int = Field(
        default=MAX_ANSWER_TOKENS, description="Longest answer, in tokens of the model.", ge=1, le=LONGEST_ANSWER_TOKENS
    )
    overlap: int | None = Field(
        default=None,
        description="Tokens that neighbouring windows of a long text share; null: as the model was built.",
        ge=0,
    )
    no_answer: bool = Field(
        default=False,
        description="If true, `answers` is empty where the model holds that the texts do not answer the question. "
        "If false, the best spans are always given, and `has_answer` tells what the model holds of them.",
    )
    offset_unit: OffsetUnit = Field(
        default="codepoint",
        description="What `start` and `end` count: code points (Python), UTF-16 units (JavaScript), bytes.",
    )
    explain: bool = Field(default=False, description="Also tell what each window of the texts gave.")
    model: str | None = Field(default=None, description="One of those at `/v1/models`; null: the default.")

    @model_validator(mode="after")
    def _one_of_both(self) -> "AnswerRequest":
        if (self.context is None) == (self.contexts is None):
            given = "neither" if self.context is None else "both"
            raise InvalidArgument(("context",), f"exactly one of `context` and `contexts` must be given, not {given}")
        return self

    @property
    def texts(self) -> tuple[str, ...]:
        """The context or contexts, as one sequence."""
        return (self.context,) if self.context is not None else tuple(self.contexts or ())


class AnswersRequest(BaseModel):
    """Several questions, each with texts of its own, answered side by side."""

    model_config = _example({"questions": [_ASKED, {**_ASKED, "question": "Where was it made?", "top_k": 2}]})

    questions: list[AnswerRequest] = Field(description="By default at most 64.", min_length=1, fail_fast=True)


class AnswerItem(BaseModel):
    """A span of a text: its characters from `start` to `end` are exactly `text`."""

    text: str
    score: float = Field(description="Probability in [0, 1]; comparable over all texts of the question.")
    start: int = Field(description="First unit of the span, counted in `offset_unit`.")
    end: int = Field(description="One past its last unit.")
    context_index: int = Field(description="Which of `contexts`; 0 for `context`.")


class Timings(BaseModel):
    """Where the time went, in milliseconds."""

    tokenize_ms: float
    infer_ms: float = Field(description="Queue and computation of the engine, as seen from here.")
    decode_ms: float
    total_ms: float | None = Field(default=None, description="Of the whole call; not in each of `results`.")


class ExplainedWindow(BaseModel):
    """The best span of one window alone."""

    context_index: int
    first_token: int = Field(description="Index of the window's first token among those of its text.")
    tokens: int = Field(description="Tokens of the text in this window.")
    start: int = Field(description="First unit of the window's best span, in `offset_unit`.")
    end: int
    logit: float = Field(description="Start logit plus end logit of that span.")
    null_logit: float = Field(description="The same of [CLS], which stands for no answer.")


class Explanation(BaseModel):
    """Why these answers."""

    null_margin: float | None = Field(description="Null logit minus best logit; null where there is no span.")
    null_threshold: float = Field(description="`has_answer` holds while the margin is not above it.")
    windows: list[ExplainedWindow]


class AnswerResponse(BaseModel):
    """Ranked answers to one question."""

    model_config = ConfigDict(json_schema_extra={"examples": [_ANSWERED]})

    answers: list[AnswerItem]
    has_answer: bool
    answers_omitted: int = Field(
        default=0,
        description="Answers of lower rank left out: the answers of a request hold at most 1 MiB of text, in equal "
        "shares for its questions.",
    )
    null_score: float = Field(description="Probability in [0, 1] that the texts do not answer the question.")
    windows: int = Field(description="Engine calls made for this question.")
    question_tokens: int = Field(description="Tokens of the question before any cut.")
    truncated: bool = Field(description="The question was cut to the model's limit of tokens.")
    model: str = Field(description="Identity of the engine that answered.")
    version: int = Field(description="Its version of the model that was asked.")
    offset_unit: OffsetUnit
    timings: Timings
    explain: Explanation | None = Field(default=None, description="Only present if asked for.")


class AnswersResponse(BaseModel):
    """Answers to several questions, in their order."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"results": [_ANSWERED], "timings": _TIMINGS}]})

    results: list[AnswerResponse]
    timings: Timings = Field(description="The slowest question of each stage, and the whole call in all.")


class ModelItem(BaseModel):
    """A model, at the version that answers now."""

    name: str = Field(description="What the `model` field of a question may say.")
    version: int
    identity: str = Field(description="What replies call it.")
    checkpoint: str
    target: str
    precision: str
    f1: float = Field(description="Percent, of the engine on the builder's questions.")
    exact_match: float
    null_threshold: float
    max_seq_len: int
    buckets: tuple[int, ...] = Field(description="Lengths of its windows, in tokens.")
    latency_ms: dict[str, dict[str, float]] = Field(description="Of the engine alone by bucket, when it was built.")
    built: str


class ModelsResponse(BaseModel):
    """The models that answer here."""

    default: str = Field(description="The one that is asked where a question names none.")
    models: list[ModelItem]


class Problem(BaseModel):
    """Every error, on every route."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"error": "top_k: must be at most 100; got 500", "error_type": "validation", "field": "top_k"}]
        }
    )

    error: str = Field(description="A sentence that names the field and the limit.")
    error_type: str
    field: str | None = Field(description="Of the body, the query string or the headers; null where it is none.")


class Health(BaseModel):
    """The service is up, or a question went through the engine and back."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"status": "ready"}]})

    status: Literal["live", "ready"]


class Info(BaseModel):
    """What runs here, and within which limits."""

    model: str
    version: int = Field(description="Version of the model in Triton's repository.")
    manifest: dict[str, Any] = Field(description="What the engine was built from and measured at.")
    limits: dict[str, int | float] = Field(description="All that are in force, by the names of the settings.")
    versions: dict[str, str | None] = Field(description="Of `triton`: null while it does not answer.")
    switches: dict[str, bool | str] = Field(description="What is on, and for whom.")
