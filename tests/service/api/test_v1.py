"""``/v1`` over real HTTP: answers, their offsets, and fields that are not acceptable."""

import json
from collections.abc import Callable
from dataclasses import replace

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from bertqa.manifest import Bundle
from bertqa.windows import WindowTokenizer
from service.app import create_app
from service.settings import Settings
from tests.support.asking import ASKED, ask, problem
from tests.support.servers import serving
from tests.support.toy_model import FakeEngine

MakeApp = Callable[..., FastAPI]


def test_answers_with_everything_that_the_api_promises(shared_client: httpx.Client, bundle: Bundle) -> None:
    response = shared_client.post("/v1/answer", json=ASKED)
    assert response.status_code == 200
    found = response.json()
    timings = found.pop("timings")
    answer = found["answers"].pop()
    assert answer.pop("score") == pytest.approx(1, abs=1e-3)
    assert answer == {"text": "Uber", "start": 16, "end": 20, "context_index": 0}
    assert found.pop("null_score") < 1e-6
    assert found == {
        "answers": [],
        "has_answer": True,
        "answers_omitted": 0,
        "windows": 1,
        "question_tokens": 5,
        "truncated": False,
        "model": bundle.manifest.identity,
        "version": 7,
        "offset_unit": "codepoint",
    }
    assert timings.keys() == {"tokenize_ms", "infer_ms", "decode_ms", "total_ms"}
    assert timings["total_ms"] >= timings["tokenize_ms"] + timings["infer_ms"] + timings["decode_ms"]
    assert [part.split(";")[0] for part in response.headers["server-timing"].split(", ")] == [
        "tokenize",
        "infer",
        "decode",
    ]


def test_ranks_several_contexts_together_and_says_which(shared_client: httpx.Client) -> None:
    contexts = ["Nothing here.", "made at «Uber»"]
    found = shared_client.post("/v1/answer", json={"question": "Who?", "contexts": contexts, "top_k": 3}).json()
    first, *others = found["answers"]
    assert (first["context_index"], first["text"]) == (1, "Uber")
    assert len(others) == 2
    assert all(contexts[each["context_index"]][each["start"] : each["end"]] == each["text"] for each in others)
    assert found["windows"] == 2


def test_a_text_without_an_answer(shared_client: httpx.Client) -> None:
    unmarked = {"context": "nothing here"}
    shown = ask(shared_client, **unmarked)
    assert (shown["has_answer"], len(shown["answers"])) == (False, 1)  # type: ignore[arg-type]
    assert ask(shared_client, **unmarked, no_answer=True)["answers"] == []
    assert len(ask(shared_client, no_answer=True)["answers"]) == 1  # type: ignore[arg-type]
    no_token = ask(shared_client, context="\u200b\u0001", explain=True)
    assert (no_token["answers"], no_token["has_answer"], no_token["null_score"]) == ([], False, 1.0)
    assert no_token["windows"] == 0
    assert no_token["explain"] == {"null_margin": None, "null_threshold": 0.0, "windows": []}


def test_long_texts_and_long_questions(client: httpx.Client, engine: FakeEngine) -> None:
    context = "word " * 2000 + "«uber» " + "word " * 2000  # far above what is handled without a thread
    found = ask(client, context=context, question="who " * 50, explain=True, offset_unit="byte")
    assert found["answers"][0]["text"] == "uber"  # type: ignore[index]
    assert (found["truncated"], found["question_tokens"]) == (True, 50)
    windows = found["explain"]["windows"]  # type: ignore[index]
    assert found["windows"] == engine.windows == len(windows)
    best = max(windows, key=lambda window: window["logit"] - window["null_logit"])
    assert context.encode()[best["start"] : best["end"]] == b"uber"


def test_explains_in_the_unit_that_was_asked_for(shared_client: httpx.Client) -> None:
    context = "😀😀 «uber»"
    for unit, start in (("codepoint", 4), ("utf16", 6), ("byte", 11)):
        found = ask(shared_client, context=context, offset_unit=unit, explain=True)
        assert found["answers"][0]["start"] == start  # type: ignore[index]
        assert found["explain"]["windows"][0]["start"] == start  # type: ignore[index]


def test_many_questions_in_one_call(client: httpx.Client, engine: FakeEngine) -> None:
    questions = [ASKED, {**ASKED, "context": "at «home»", "offset_unit": "byte"}]
    body = client.post("/v1/answers", json={"questions": questions}).json()
    assert [each["answers"][0]["text"] for each in body["results"]] == ["Uber", "home"]
    assert body["results"][1]["answers"][0]["start"] == 5
    assert body["timings"]["total_ms"] > 0
    for each in body["results"]:  # as in a reply to one question, but for the time of the whole call
        assert "explain" not in each
        assert each["timings"].keys() == {"tokenize_ms", "infer_ms", "decode_ms"}
    explained = client.post("/v1/answers", json={"questions": [ASKED, {**ASKED, "explain": True}]}).json()
    assert ["explain" in each for each in explained["results"]] == [False, True]
    before = engine.windows
    for bad, field in (
        ({"question": " "}, "questions[1].question"),
        ({"context": " "}, "questions[1].context"),
        ({"top_k": 0}, "questions[1].top_k"),
        ({"contexts": ["x"]}, "questions[1].context"),
        ({"context": None, "contexts": ["x", "\n"]}, "questions[1].contexts[1]"),
        ({"overlap": 60}, "questions[1].overlap"),
        ({"color": 1}, "questions[1].color"),
    ):
        response = client.post("/v1/answers", json={"questions": [ASKED, {**ASKED, **bad}]})
        assert problem(response, 422, "validation", field).startswith(field)
    problem(client.post("/v1/answers", json={"questions": [ASKED] * 65}), 422, "validation", "questions")
    problem(client.post("/v1/answers", json={"questions": []}), 422, "validation", "questions")
    assert engine.windows == before, "a call that is refused must not reach the engine"


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"question": None}, "question", "must be a string"),
        ({"question": ""}, "question", "must not be empty"),
        ({"question": "\t \n"}, "question", "white space"),
        ({"question": "\u200b"}, "question", "no token"),
        ({"question": "x" * 1001}, "question", "at most 1,000 characters; got 1,001"),
        ({"context": "x" * 200_001}, "context", "at most 200,000 characters"),
        ({"context": None}, "context", "neither"),
        ({"contexts": ["x"]}, "context", "both"),
        ({"context": None, "contexts": []}, "contexts", "must not be empty"),
        ({"context": None, "contexts": ["x"] * 65}, "contexts", "at most 64 texts; got 65"),
        ({"context": None, "contexts": ["x", "x", "x", 5]}, "contexts[3]", "must be a string"),
        ({"context": None, "contexts": ["x", ""]}, "contexts[1]", "must not be empty"),
        ({"context": None, "contexts": ["x" * 100_001] * 2}, "contexts", "characters together"),
        ({"top_k": 101}, "top_k", "at most 100; got 101"),
        ({"top_k": 0}, "top_k", "at least 1; got 0"),
        ({"top_k": "3"}, "top_k", "whole number"),
        ({"top_k": True}, "top_k", "whole number"),
        ({"top_k": 1.5}, "top_k", "whole number"),
        ({"max_answer_tokens": 201}, "max_answer_tokens", "at most 200"),
        ({"overlap": -1}, "overlap", "at least 0"),
        ({"overlap": 63}, "overlap", "must be from 0 to"),
        ({"overlap": 55, "context": "x " * 9_000}, "overlap", "windows"),
        ({"context": "!" * 190_000}, "context", "windows"),
        ({"context": "!" * 100_000, "max_answer_tokens": 200}, "max_answer_tokens", "at most 160"),
        ({"no_answer": "yes"}, "no_answer", "true or false"),
        ({"offset_unit": "char"}, "offset_unit", "'codepoint', 'utf16' or 'byte'"),
        ({"topk": 3}, "topk", "unknown field"),
    ],
)
def test_a_field_that_is_not_valid_is_named_with_its_limit(
    shared_client: httpx.Client, fields: dict[str, object], field: str, words: str
) -> None:
    error = problem(shared_client.post("/v1/answer", json={**ASKED, **fields}), 422, "validation", field)
    assert error.startswith(f"{field}: ")
    assert words in error


texts = st.text(st.characters(exclude_categories=[]), min_size=1, max_size=60) | st.text(
    st.sampled_from("ab «»\n\r\0é\u0301서울م😀👨\u200d👩\U0001f1f0\ud800"), min_size=1, max_size=60
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(question=texts, context=texts, top_k=st.integers(1, 5), no_answer=st.booleans())
def test_any_text_gives_exact_spans_in_every_unit_or_a_plain_refusal(
    shared_client: httpx.Client, question: str, context: str, top_k: int, no_answer: bool
) -> None:
    spans = {}
    for unit in ("codepoint", "utf16", "byte"):
        asked = {"question": question, "context": context, "top_k": top_k, "no_answer": no_answer, "offset_unit": unit}
        response = shared_client.post(
            "/v1/answer", content=json.dumps(asked).encode(), headers={"content-type": "application/json"}
        )
        assert response.status_code in (200, 422), response.text
        if response.status_code == 422:
            assert response.json()["field"] in ("question", "context")
            return
        spans[unit] = [(each["start"], each["end"], each["text"]) for each in response.json()["answers"]]
    for start, end, text in spans["codepoint"]:
        assert context[start:end] == text != ""
    encoded = context.encode("utf-16-le")
    assert [encoded[2 * start : 2 * end].decode("utf-16-le") for start, end, _ in spans["utf16"]] == [
        text for _, _, text in spans["codepoint"]
    ]
    assert [context.encode()[start:end].decode() for start, end, _ in spans["byte"]] == [
        text for _, _, text in spans["codepoint"]
    ]


def test_an_overlap_too_large_for_the_models_own_windows_is_no_error_of_the_client(bundle: Bundle) -> None:
    manifest = replace(bundle.manifest, overlap=60, engine_sha256="3" * 64)
    window_tokenizer = WindowTokenizer(
        Tokenizer.from_str(bundle.tokenizer.tokenizer_json()), max_seq_len=64, max_question_tokens=16, overlap=60
    )
    wide = Bundle("bert_qa", 7, manifest, window_tokenizer)
    app = create_app(Settings(), engine=FakeEngine(manifest.identity), bundle=wide)
    with serving(app) as url, httpx.Client(base_url=url, trust_env=False) as client:
        for context in ("It was made at «Uber».", "It was made at «Uber». " * 300):
            reply = client.post("/v1/answer", json={"question": "who made it?", "context": context})
            assert reply.status_code == 200, reply.text
            assert reply.json()["answers"][0]["text"] == "Uber"
