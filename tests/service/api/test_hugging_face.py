"""Test the Hugging Face routes with the real ``huggingface_hub`` clients over real HTTP."""

import asyncio
from collections.abc import Mapping
from typing import Any

import httpx
import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from bertqa.manifest import Bundle
from bertqa.spans import Answer, Decoded
from service.api.hugging_face import Inputs, Parameters, to_answer, to_question
from service.inference.question import Question, Result, Tokenized
from service.inference.registry import ServedModel
from service.observability.metrics import Metrics
from service.settings import Settings
from tests.support.toy_model import FakeEngine

QUESTION, CONTEXT = "Where was it made?", "😀 made at «Uber» by 漢字"
INPUTS = {"question": QUESTION, "context": CONTEXT}
UBER = {"answer": "Uber", "start": 11, "end": 15}
NONE = {"answer": "", "start": 0, "end": 0}


@pytest.fixture(autouse=True)
def no_proxy_and_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def shared_url(shared_client: httpx.Client) -> str:
    return str(shared_client.base_url).rstrip("/")


def without_score(span: Mapping[str, object]) -> dict[str, object]:
    assert span.keys() == {"answer", "score", "start", "end"}
    score = span["score"]
    assert isinstance(score, float)
    assert 0 <= score <= 1
    return {name: value for name, value in span.items() if name != "score"}


@pytest.mark.parametrize(
    "path", ["", "/", "/predict", "/predict/", "/models/deepset/roberta-base-squad2", "/models/%0A*"]
)
def test_the_real_client_finds_its_answer_at_every_address(shared_url: str, path: str) -> None:
    client = InferenceClient(shared_url + path, token="anything")
    answer = client.question_answering(QUESTION, CONTEXT)
    assert not isinstance(answer, list)
    assert without_score(vars(answer)) == UBER


def test_the_real_client_with_all_its_parameters(shared_url: str) -> None:
    client = InferenceClient(base_url=f"{shared_url}/models/x/pipeline/question-answering", token="anything")
    answers = client.question_answering(
        QUESTION,
        CONTEXT,
        top_k=4,
        doc_stride=8,
        max_answer_len=2,
        max_seq_len=48,
        max_question_len=8,
        handle_impossible_answer=True,
        align_to_words=True,
    )
    assert isinstance(answers, list)
    assert len(answers) == 4
    assert (answers[0].answer, answers[0].start, answers[0].end) == ("Uber", 11, 15)
    assert answers[3].answer == "", "the empty answer takes part"
    assert [answer.score for answer in answers] == sorted((answer.score for answer in answers), reverse=True)


def test_the_real_async_client(shared_url: str) -> None:
    async def ask() -> str:
        async with AsyncInferenceClient(shared_url, token="anything") as client:
            answer = await client.question_answering(QUESTION, CONTEXT)
            assert not isinstance(answer, list)
            return str(answer.answer)

    assert asyncio.run(ask()) == "Uber"


def test_the_real_client_shows_our_error(shared_url: str) -> None:
    client = InferenceClient(shared_url, token="anything")
    with pytest.raises(HfHubHTTPError, match=r"parameters\.top_k: must be at most 100; got 500"):
        client.question_answering(QUESTION, CONTEXT, top_k=500)


@pytest.mark.parametrize(("top_k", "kind"), [(None, dict), (1, dict), ("1", dict), (2, list), (100, list)])
def test_an_object_for_one_and_a_list_for_more(shared_client: httpx.Client, top_k: object, kind: type) -> None:
    found: Any = shared_client.post("/", json={"inputs": INPUTS, "parameters": {"top_k": top_k}}).json()
    assert isinstance(found, kind)
    spans: Any = found if kind is list else [found]
    for span in spans:
        assert INPUTS["context"][span["start"] : span["end"]] == span["answer"]


def test_a_list_stays_a_list_when_there_is_less_than_was_asked_for(shared_client: httpx.Client) -> None:
    found = shared_client.post(
        "/", json={"inputs": {"question": "who", "context": "uber"}, "parameters": {"top_k": 5}}
    ).json()
    assert [without_score(span) for span in found] == [{"answer": "uber", "start": 0, "end": 4}]


def test_no_answer(shared_client: httpx.Client) -> None:
    unmarked = {"question": "who?", "context": "nothing here"}
    impossible = {"handle_impossible_answer": True}

    def ask(parameters: Mapping[str, object], inputs: dict[str, str] = unmarked) -> Any:
        return shared_client.post("/", json={"inputs": inputs, "parameters": parameters}).json()

    plain, null, both = ask({}), ask(impossible), ask({**impossible, "top_k": 2})
    assert isinstance(plain, dict)
    assert plain["answer"] != ""
    assert isinstance(null, dict)
    assert without_score(null) == NONE
    assert isinstance(both, list)
    assert [without_score(span) for span in both] == [NONE, without_score(plain)]
    assert without_score(ask(impossible, INPUTS)) == UBER
    # Not one token of the text is known to the model: clients take null or [] for a malformed response.
    blank = {"question": "who?", "context": "\u200b"}
    assert ask({}, blank) == {**NONE, "score": 1.0}
    assert ask({"top_k": 2}, blank) == [{**NONE, "score": 1.0}]


def test_other_ways_to_write_a_request(shared_client: httpx.Client) -> None:
    assert len(shared_client.post("/predict?top_k=2&align_to_words=false", json={"inputs": INPUTS}).json()) == 2
    own = shared_client.post("/predict?top_k=2", json={"inputs": INPUTS, "parameters": {"top_k": 1}}).json()
    assert without_score(own) == UBER
    old = {"inputs": INPUTS, "options": {"wait_for_model": True, "use_cache": False}}
    assert without_score(shared_client.post("/models/x", json=old).json()) == UBER
    vertex = shared_client.post(
        "/predict", json={"instances": [INPUTS, {"question": "a", "context": "at «home»"}]}
    ).json()
    assert [span["answer"] for span in vertex["predictions"]] == ["Uber", "home"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "inputs"),
        ({"inputs": INPUTS, "instances": [INPUTS]}, "inputs"),
        ({"instances": []}, "inputs"),
        ({"instances": [INPUTS] * 65}, "instances"),
        ({"inputs": "text"}, "inputs"),
        ({"inputs": {"question": "a"}}, "inputs.context"),
        ({"inputs": {**INPUTS, "question": " "}}, "inputs.question"),
        ({"inputs": {**INPUTS, "question": "\u200b"}}, "inputs.question"),
        ({"inputs": {**INPUTS, "context": ""}}, "inputs.context"),
        ({"inputs": {**INPUTS, "context": "x" * 200_001}}, "inputs.context"),
        ({"instances": [INPUTS, {**INPUTS, "context": "\n"}]}, "instances[1].context"),
        ({"inputs": INPUTS, "parameters": {"topk": 1}}, "parameters.topk"),
        ({"inputs": INPUTS, "parameters": {"top_k": 0}}, "parameters.top_k"),
        ({"inputs": INPUTS, "parameters": {"max_answer_len": 0}}, "parameters.max_answer_len"),
        ({"inputs": INPUTS, "parameters": {"doc_stride": 64}}, "parameters.doc_stride"),
        ({"inputs": INPUTS, "parameters": {"max_question_len": 100}}, "parameters.max_question_len"),
        ({"inputs": {**INPUTS, "context": "x " * 95_000}, "parameters": {"max_seq_len": 1}}, "parameters.max_seq_len"),
        ({"inputs": INPUTS, "color": 1}, "color"),
    ],
)
def test_what_is_refused(shared_client: httpx.Client, body: dict[str, object], field: str) -> None:
    response = shared_client.post("/", json=body)
    assert response.status_code == 422, response.text
    assert response.json()["field"] == field, response.text
    assert response.json()["error"].startswith(f"{field}: ")


def test_an_unknown_parameter_of_the_query_string_is_refused(shared_client: httpx.Client) -> None:
    response = shared_client.post("/?colour=red", json={"inputs": INPUTS})
    assert (response.status_code, response.json()["field"]) == (422, "colour")


def test_parameters_become_ours(bundle: Bundle, engine: FakeEngine) -> None:
    served = ServedModel(bundle, engine, Metrics(), Settings())

    def question(**parameters: int) -> tuple[int | None, int | None, int | None, int]:
        asked = to_question(Inputs(question="a", context="b"), Parameters(**parameters), served)  # type: ignore[arg-type]
        return asked.max_seq_len, asked.max_question_tokens, asked.overlap, asked.max_answer_tokens

    assert question() == (64, 16, 16, 15)
    assert question(max_answer_len=7, doc_stride=3) == (64, 16, 3, 7)
    assert question(max_seq_len=512) == (64, 16, 16, 15), "clipped to what the engine can"
    assert question(max_seq_len=1) == (32, 16, 6, 15), "and to what it does not get faster below"
    assert question(max_question_len=60) == (64, 60, 0, 15), "a default makes room for what was asked for"


def test_equal_texts_are_merged_as_the_pipeline_does(bundle: Bundle, engine: FakeEngine) -> None:
    """transformers 5.2: `get_answer` compares in lower case, adds up the scores, and keeps the first position."""
    model = ServedModel(bundle, engine, Metrics(), Settings())
    question = Question(model=model, question="a", contexts=("b",), top_k=5)
    found = [("Uber", 0.3, 10), ("NVIDIA", 0.25, 30), ("uber", 0.2, 50), ("nvidia", 0.15, 70), ("UBER.", 0.05, 90)]
    answers = tuple(Answer(text, score, start, start + len(text), 0) for text, score, start in found)

    def answer(*, null_score: float = 0.1, has_answer: bool = True, **parameters: object) -> Any:
        decoded = Decoded(answers, has_answer, null_score, 0.0)
        result = Result(Tokenized(question, (), 0.0, 0.0), (), decoded, 0.0, 0.0, 0.0)
        return to_answer(result, Parameters(**parameters))  # type: ignore[arg-type]

    merged = answer()
    assert [span["answer"] for span in merged] == ["Uber", "NVIDIA", "UBER."]
    assert [span["score"] for span in merged] == pytest.approx([0.5, 0.4, 0.05])
    assert [(span["start"], span["end"]) for span in merged] == [(10, 14), (30, 36), (90, 95)]
    with_null = answer(handle_impossible_answer=True)
    assert [span["answer"] for span in with_null] == ["Uber", "NVIDIA", "", "UBER."]
    answers = answers[1:4]  # the second and the fourth together are better than the third
    assert [span["answer"] for span in answer()] == ["NVIDIA", "uber"]


def test_spans_of_one_text_are_merged_over_http(shared_client: httpx.Client) -> None:
    body = {
        "inputs": {"question": "who", "context": "uber Uber uber"},
        "parameters": {"top_k": 20, "max_answer_len": 1},
    }
    (span,) = shared_client.post("/", json=body).json()
    assert (span["answer"].lower(), 0 < span["score"] <= 1) == ("uber", True)
    own = {"question": "who", "context": "uber Uber uber", "top_k": 20, "max_answer_tokens": 1}
    answers = shared_client.post("/v1/answer", json=own).json()["answers"]
    assert len(answers) == 3, "our own API keeps every occurrence"
    assert span["score"] == pytest.approx(sum(answer["score"] for answer in answers))
