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
    # Sets examples; rejects unknown fields, and strings or booleans as numbers.
    return ConfigDict(extra="forbid", strict=True, frozen=True, json_schema_extra={"examples": list(examples)})


class AnswerRequest(BaseModel):
    """A question, and one or several texts to search for the answer."""

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

    question: str = Field(description="The question; at most 1,000 characters by default, see `/info`.", min_length=1)
    context: str | None = Field(
        default=None,
        description="The text; at most 200,000 characters by default. Give either this or `contexts`.",
        min_length=1,
    )
    contexts: list[Annotated[str, Field(min_length=1)]] | None = Field(
        default=None,
        description="Several texts, ranked together; by default at most 64 texts with 200,000 characters in total.",
        min_length=1,
        fail_fast=True,
    )
    top_k: int = Field(default=1, description="Number of answers, each a distinct span.", ge=1, le=MAX_TOP_K)
    max_answer_tokens: int = Field(
        default=MAX_ANSWER_TOKENS, description="Longest answer, in tokens of the model.", ge=1, le=LONGEST_ANSWER_TOKENS
    )
    overlap: int | None = Field(
        default=None,
        description="Tokens that neighbouring windows of a long text share; null: the model's default.",
        ge=0,
    )
    no_answer: bool = Field(
        default=False,
        description="If true, `answers` is empty when the model finds no answer in the texts. If false, it always has "
        "the best spans; `has_answer` says whether the model considers them an answer.",
    )
    offset_unit: OffsetUnit = Field(
        default="codepoint",
        description="Unit of `start` and `end`: code points (Python), UTF-16 code units (JavaScript) or UTF-8 bytes.",
    )
    explain: bool = Field(default=False, description="Also return the best span of each window.")
    model: str | None = Field(default=None, description="Name of a model, see `/v1/models`; null: the default model.")

    @model_validator(mode="after")
    def _one_of_both(self) -> "AnswerRequest":
        if (self.context is None) == (self.contexts is None):
            given = "neither" if self.context is None else "both"
            raise InvalidArgument(("context",), f"give exactly one of `context` and `contexts`, not {given}")
        return self

    @property
    def texts(self) -> tuple[str, ...]:
        """The context or contexts, as a sequence."""
        return (self.context,) if self.context is not None else tuple(self.contexts or ())


class AnswersRequest(BaseModel):
    """Several questions, each with its own texts, answered concurrently."""

    model_config = _example({"questions": [_ASKED, {**_ASKED, "question": "Where was it made?", "top_k": 2}]})

    questions: list[AnswerRequest] = Field(description="At most 64 by default.", min_length=1, fail_fast=True)


class AnswerItem(BaseModel):
    """An answer: the characters of its context from `start` to `end` are exactly `text`."""

    text: str
    score: float = Field(description="Probability in [0, 1], comparable across all texts of the question.")
    start: int = Field(description="Start of the span, in units of `offset_unit`.")
    end: int = Field(description="End of the span, one past its last unit.")
    context_index: int = Field(description="Index in `contexts`; 0 for `context`.")


class Timings(BaseModel):
    """Milliseconds spent in each stage."""

    tokenize_ms: float
    infer_ms: float = Field(description="Waiting for the engine and computing, as seen by the service.")
    decode_ms: float
    total_ms: float | None = Field(default=None, description="The whole call; absent in each of `results`.")


class ExplainedWindow(BaseModel):
    """The best span of one window."""

    context_index: int
    first_token: int = Field(description="Index of the window's first token in its text.")
    tokens: int = Field(description="Number of tokens of the text in this window.")
    start: int = Field(description="Start of the window's best span, in units of `offset_unit`.")
    end: int
    logit: float = Field(description="Start logit plus end logit of that span.")
    null_logit: float = Field(description="The same sum for [CLS], which means no answer.")


class Explanation(BaseModel):
    """Details that explain the answers."""

    null_margin: float | None = Field(description="Null logit minus best logit; null if there is no span.")
    null_threshold: float = Field(description="`has_answer` is true if the margin is at most this.")
    windows: list[ExplainedWindow]


class AnswerResponse(BaseModel):
    """Ranked answers to one question."""

    model_config = ConfigDict(json_schema_extra={"examples": [_ANSWERED]})

    answers: list[AnswerItem]
    has_answer: bool
    answers_omitted: int = Field(
        default=0,
        description="Number of lower-ranked answers left out. The answers of a request have at most 1 MiB of text, "
        "shared equally by its questions.",
    )
    null_score: float = Field(description="Probability in [0, 1] that the texts do not answer the question.")
    windows: int = Field(description="Number of engine calls for this question.")
    question_tokens: int = Field(description="Tokens of the question before truncation.")
    truncated: bool = Field(description="Whether the question was cut to the model's token limit.")
    model: str = Field(description="Identity of the engine that answered.")
    version: int = Field(description="Version of the model that answered.")
    offset_unit: OffsetUnit
    timings: Timings
    explain: Explanation | None = Field(default=None, description="Present only if requested.")


class AnswersResponse(BaseModel):
    """Answers to several questions, in the same order."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"results": [_ANSWERED], "timings": _TIMINGS}]})

    results: list[AnswerResponse]
    timings: Timings = Field(description="For each stage the slowest question; for the total, the whole call.")


class ModelItem(BaseModel):
    """A model and its active version."""

    name: str = Field(description="Value for the `model` field of a question.")
    version: int
    identity: str = Field(description="Identity of its engine, as in the `model` field of replies.")
    checkpoint: str
    target: str
    precision: str
    f1: float = Field(description="F1 of the engine on the builder's questions, in percent.")
    exact_match: float
    null_threshold: float
    max_seq_len: int
    buckets: tuple[int, ...] = Field(description="Window lengths, in tokens.")
    latency_ms: dict[str, dict[str, float]] = Field(
        description="Latency of the engine alone for each bucket, measured when it was built."
    )
    built: str


class ModelsResponse(BaseModel):
    """The models that the service has."""

    default: str = Field(description="Model for questions that name none.")
    models: list[ModelItem]


class Problem(BaseModel):
    """The body of every error response."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"error": "top_k: must be at most 100; got 500", "error_type": "validation", "field": "top_k"}]
        }
    )

    error: str = Field(description="A sentence that names the field and the limit.")
    error_type: str
    field: str | None = Field(description="Name of the field, parameter or header; null if the error concerns none.")


class Health(BaseModel):
    """Result of a health check."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"status": "ready"}]})

    status: Literal["live", "ready"]


class Info(BaseModel):
    """The model, its limits and the versions of the service."""

    model: str
    version: int = Field(description="Version of the model in the model repository.")
    manifest: dict[str, Any] = Field(description="How the engine was built and what was measured.")
    limits: dict[str, int | float] = Field(description="All limits, by the names of their settings.")
    versions: dict[str, str | None] = Field(
        description="Versions of the components; `triton` is null while it does not answer."
    )
    switches: dict[str, bool | str] = Field(description="Which features are on, and for whom.")
