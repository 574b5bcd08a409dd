"""The application over real HTTP: the API, its errors, its health, and what it does when things go wrong."""

import asyncio
import json
import re
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from bertqa.manifest import Bundle, BundleMismatch
from bertqa.spans import InvalidLogits
from bertqa.windows import WindowMaker
from service.app import create_app
from service.inference import readiness
from service.settings import Settings
from service.triton.errors import ModelBroken, ModelOverloaded, ModelTimeout, ModelUnavailable
from tests.support.asking import ASKED, problem
from tests.support.servers import serving
from tests.support.toy_model import FakeEngine
from tests.support.waiting import until

MakeApp = Callable[..., FastAPI]


def ask(client: httpx.Client, **fields: object) -> dict[str, object]:
    response = client.post("/v1/answer", json={**ASKED, **fields})
    assert response.status_code == 200, response.text
    found = response.json()
    assert isinstance(found, dict)
    return found


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


@pytest.mark.parametrize(
    ("body", "status", "error_type", "field"),
    [
        (b"", 400, "malformed_json", None),
        (b"  ", 400, "malformed_json", None),
        (b"{", 400, "malformed_json", None),
        (b'{"question": "a", "context": "b"} x', 400, "malformed_json", None),
        (b'{"question": "a", "context": "b", "top_k": NaN}', 400, "malformed_json", None),
        (b'{"question": "a", "context": "b", "top_k": 1e400}', 422, "validation", "top_k"),
        (b'{"question": "a", "context": "b", "top_k": ' + b"9" * 5000 + b"}", 400, "malformed_json", None),
        (b'{"question": "a", "question": "b", "context": "b"}', 400, "malformed_json", None),
        (json.dumps({f"f{n}": 1 for n in range(70)}).encode(), 400, "malformed_json", None),
        ('{"question": "é", "context": "b"}'.encode("latin-1"), 400, "malformed_json", None),
        ('{"question": "a", "context": "b"}'.encode("utf-16"), 400, "malformed_json", None),
        (b"[" * 100_000, 400, "malformed_json", None),
        (b"[1]", 422, "validation", "body"),
        (b"null", 422, "validation", "body"),
        (b'"text"', 422, "validation", "body"),
        (b'{"question": "\\ud800", "context": "b"}', 422, "validation", "question"),
        (b'{"question": "a", "contexts": ["b", "\\udfff"]}', 422, "validation", "contexts[1]"),
        (b'{"\\ud800": "a", "question": "a", "context": "b"}', 422, "validation", "\\ud800"),
        (b'{"context": "b"}', 422, "validation", "question"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/answer", "/predict"])
def test_a_body_that_is_not_valid(
    shared_client: httpx.Client, path: str, body: bytes, status: int, error_type: str, field: str | None
) -> None:
    response = shared_client.post(path, content=body, headers={"content-type": "application/json"})
    if path == "/v1/answer" and field != "\\ud800":
        problem(response, status, error_type, field)
    else:  # another schema, or a name that cannot be written as it came: still an error of the same kind
        assert response.status_code == status
        assert response.json()["error_type"] == error_type


def test_a_byte_order_mark_and_a_plus_json_type_are_welcome(shared_client: httpx.Client) -> None:
    body = b"\xef\xbb\xbf" + json.dumps(ASKED).encode()
    response = shared_client.post(
        "/v1/answer", content=body, headers={"content-type": "application/ld+json; charset=utf-8"}
    )
    assert response.status_code == 200


def test_a_content_type_that_is_not_json(shared_client: httpx.Client) -> None:
    assert "none" in problem(shared_client.post("/v1/answer", content=b"{}"), 415, "not_json")
    assert "x-www-form-urlencoded" in problem(shared_client.post("/", data={"a": "b"}), 415, "not_json")


def test_routes_and_methods_that_are_not_there(shared_client: httpx.Client) -> None:
    problem(shared_client.get("/nowhere"), 404, "not_found")
    problem(shared_client.get("/static/../app.py"), 404, "not_found")
    problem(shared_client.post("/v1/answer/", json=ASKED), 404, "not_found")
    response = shared_client.get("/v1/answer")
    problem(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


def test_the_body_is_bounded_before_it_is_parsed(make_app: MakeApp) -> None:
    with serving(make_app(max_body_bytes=1000)) as url, httpx.Client(base_url=url, trust_env=False) as client:
        json_type = {"content-type": "application/json"}
        announced = client.post("/v1/answer", content=b"[" * 1001, headers=json_type)
        assert "1,000 bytes" in problem(announced, 413, "body_too_large")
        chunked = client.post("/", content=(b"[" * 100 for _ in range(11)), headers=json_type)
        problem(chunked, 413, "body_too_large")
        problem(client.post("/", content=b"[" * 1000, headers=json_type), 400, "malformed_json")


@pytest.mark.parametrize(
    ("failure", "status", "error_type"),
    [
        (ModelUnavailable("no connection"), 503, "engine_unavailable"),
        (ModelOverloaded("the queue is full"), 503, "engine_overloaded"),
        (ModelBroken("output of another shape"), 503, "engine_broken"),
        (InvalidLogits("start_logits: NaN"), 503, "engine_broken"),
        (ModelTimeout("no answer in time"), 504, "engine_timeout"),
    ],
)
def test_a_failing_engine(
    client: httpx.Client,
    engine: FakeEngine,
    failure: Exception,
    status: int,
    error_type: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(readiness, "REUSE_S", 0.0)
    engine.failure = failure
    inputs = {"question": "a", "context": "b"}
    for path, body in (
        ("/v1/answer", ASKED),
        ("/v1/answers", {"questions": [ASKED, ASKED]}),
        ("/", {"inputs": inputs}),
    ):
        response = client.post(path, json=body)
        assert problem(response, status, error_type) == str(failure)
        assert response.headers.get("retry-after") == ("1" if status in (503, 504) else None)
    problem(client.get("/health/ready"), status, error_type)
    assert client.get("/health/live").json() == {"status": "live"}
    assert f'bertqa_errors_total{{error_type="{error_type}"}} 4.0' in client.get("/metrics").text
    engine.failure = None
    assert client.get("/health/ready").json() == {"status": "ready"}


def test_an_unforeseen_error_is_500_and_tells_nothing(
    client: httpx.Client, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.failure = ZeroDivisionError("a secret")
    response = client.post("/v1/answer", json=ASKED, headers={"x-request-id": "abc"})
    assert "secret" not in problem(response, 500, "internal")
    assert response.headers["x-request-id"] == "abc"
    assert "request abc failed" in caplog.text
    assert "a secret" in caplog.text


def test_request_ids(shared_client: httpx.Client) -> None:
    def sent(**headers: str) -> str:
        return shared_client.get("/health/live", headers={k.replace("_", "-"): v for k, v in headers.items()}).headers[
            "x-request-id"
        ]

    assert sent(x_request_id="mine", x_amzn_trace_id="theirs") == "mine"
    assert sent(x_amzn_trace_id="theirs") == "theirs"
    assert sent(x_request_id="x" * 129, x_amzn_trace_id="theirs") == "theirs"
    assert sent(x_request_id="two words") != sent(x_request_id="two words")


def test_a_client_that_leaves_stops_the_engine(url: str, engine: FakeEngine) -> None:
    engine.delay_s = 60
    body = json.dumps(ASKED).encode()
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        head = f"POST /v1/answer HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        assert engine.started.wait(10)
        assert not engine.cancelled.is_set()
    assert engine.cancelled.wait(10)

    def scrape() -> str:
        return httpx.get(f"{url}/metrics", trust_env=False).text

    until(lambda: 'status="499"' in scrape(), "the request is not counted, though its handler has ended")
    text = scrape()
    assert "bertqa_requests_in_flight 1.0" in text  # the scrape itself


def test_the_deadline_is_the_shorter_of_ours_and_the_clients(make_app: MakeApp, engine: FakeEngine) -> None:
    deadlines = []

    async def predict(windows: object, *, deadline: float) -> list[object]:
        deadlines.append(deadline - time.monotonic())
        raise ModelTimeout("late")

    engine.predict = predict  # type: ignore[assignment,method-assign]
    with serving(make_app(deadline_s=5)) as url, httpx.Client(base_url=url, trust_env=False) as client:
        for wish in ({}, {"x-timeout-ms": "900"}, {"x-timeout-ms": "99999"}):
            problem(client.post("/v1/answer", json=ASKED, headers=wish), 504, "engine_timeout")
        assert [round(seconds) for seconds in deadlines] == [5, 1, 5]
        for nonsense in ("0", "-1", "soon", "1e3", "9" * 30):
            response = client.post("/", json={"inputs": ASKED}, headers={"x-timeout-ms": nonsense})
            problem(response, 422, "validation", "x-timeout-ms")


def test_an_engine_of_another_bundle_is_refused(bundle: Bundle, make_app: MakeApp, engine: FakeEngine) -> None:
    engine.identity = "other-cpu-int8-ffffffffffff"
    with pytest.raises(BundleMismatch, match=f"{engine.identity}.*{bundle.manifest.identity}.*repository"):
        start_and_stop(make_app())


def start_and_stop(app: FastAPI) -> None:
    async def run() -> None:
        async with app.router.lifespan_context(app):
            pass

    asyncio.run(run())


def test_the_identity_is_checked_when_a_late_engine_comes(
    make_app: MakeApp, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readiness, "REUSE_S", 0.0)
    engine.failure = ModelUnavailable("not up yet")
    right = engine.identity
    with serving(make_app()) as url, httpx.Client(base_url=url, trust_env=False) as client:
        problem(client.get("/health/ready"), 503, "engine_unavailable")
        engine.failure, engine.identity = None, "other"
        problem(client.get("/health/ready"), 503, "engine_mismatch")
        assert "other" in problem(client.post("/v1/answer", json=ASKED), 503, "engine_mismatch")
        assert engine.windows == 0
        engine.identity = right
        assert client.post("/v1/answer", json=ASKED).status_code == 200
        engine.identity = "reloaded with another"
        problem(client.get("/health/ready"), 503, "engine_mismatch")
        problem(client.post("/v1/answer", json=ASKED), 503, "engine_mismatch")


def test_an_engine_that_was_given_is_not_closed(make_app: MakeApp, engine: FakeEngine) -> None:
    start_and_stop(make_app())
    assert not engine.closed


def test_the_circuit_of_a_lost_engine_is_seen_in_the_metrics(bundle: Bundle) -> None:
    app = create_app(Settings(triton_url="127.0.0.1:1,127.0.0.1:2"), bundle=bundle)
    with serving(app) as url, httpx.Client(base_url=url, trust_env=False) as client:
        said = [problem(client.post("/v1/answer", json=ASKED), 503, "engine_unavailable") for _ in range(12)]
        assert any("left alone" in line for line in said)  # the others are trials
        text = client.get("/metrics").text
    for replica in ("127.0.0.1:1", "127.0.0.1:2"):
        labels = f'model="bert_qa",replica="{replica}"'
        assert f'bertqa_circuit_state{{{labels},version="7"}} 2.0' in text
        assert f'bertqa_circuit_transitions_total{{{labels},to="open",version="7"}} ' in text


def test_a_repository_without_a_version_is_refused(tmp_path: Path, engine: FakeEngine) -> None:
    with pytest.raises(BundleMismatch, match="holds no built version"):
        start_and_stop(create_app(Settings(repository=tmp_path), engine=engine))


def test_info_metrics_and_documentation(client: httpx.Client, bundle: Bundle, engine: FakeEngine) -> None:
    ask(client)
    ask(client, question="who " * 50)
    info = client.get("/info").json()
    assert info["model"] == bundle.manifest.identity
    assert info["version"] == 7
    assert info["manifest"]["buckets"] == [32, 64]
    assert info["limits"]["max_question_chars"] == 1000
    assert info["limits"]["deadline_s"] == 10
    assert info["limits"].keys() > {"max_in_flight", "max_wait_s", "max_memory_mb", "max_top_k", "max_answer_tokens"}
    assert info["versions"]["triton"] == "2.51.0"
    assert all(info["versions"][name] for name in ("bertqa", "python", "fastapi", "uvicorn", "tokenizers", "numpy"))
    assert info["switches"].items() >= {
        ("access_log", True),
        ("log_texts", False),
        ("tracing", False),
        ("auth", False),
        ("cache", False),
    }
    engine.failure = ModelUnavailable("gone")
    assert client.get("/info").json()["versions"]["triton"] is None
    engine.failure = None
    text = client.get("/metrics").text
    for line in (
        'bertqa_requests_total{route="/v1/answer",status="200"} 2.0',
        "bertqa_question_truncations_total 1.0",
        "bertqa_windows_sum 2.0",
        'bertqa_seconds_count{stage="tokenize"} 2.0',
        'bertqa_seconds_count{stage="total"} 2.0',
        f'bertqa_model_info{{identity="{bundle.manifest.identity}",model="bert_qa",version="7"}} 1.0',
        'bertqa_questions_total{model="bert_qa",version="7"} 2.0',
    ):
        assert line in text
    document = client.get("/openapi.json").json()
    assert {"/v1/answer", "/v1/answers", "/", "/models/{model_id}", "/health/ready", "/info"} <= document[
        "paths"
    ].keys()
    answer = document["paths"]["/v1/answer"]["post"]
    assert answer["responses"]["422"]["content"]["application/json"]["examples"]["validation"]["value"]["field"]
    assert "x-timeout-ms" in [parameter["name"] for parameter in answer["parameters"]]
    model = document["paths"]["/models/{model_id}"]["post"]
    assert [parameter["name"] for parameter in model["parameters"]] == ["model_id", "x-timeout-ms"]
    examples = document["components"]["schemas"]["AnswerRequest"]["examples"]
    for example in examples:
        assert client.post("/v1/answer", json=example).status_code == 200


def test_the_page_and_its_files(shared_client: httpx.Client) -> None:
    page = shared_client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert shared_client.head("/").status_code == 200
    for path in re.findall(r'(?:src|href)="(/static/[^"]+)"', page.text):
        assert shared_client.get(path).status_code == 200, path
    assert "http://" not in page.text.replace("http://www.w3.org/", "")


def test_every_response_is_hardened(shared_client: httpx.Client) -> None:
    for response in (
        shared_client.get("/health/live"),
        shared_client.get("/nowhere"),
        shared_client.post("/v1/answer", json=ASKED),
    ):
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        assert response.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")


def test_settings_are_read_from_the_environment() -> None:
    environ = {"BERTQA_TRITON_URL": "a:1, b:2", "BERTQA_DEADLINE_S": "2.5", "BERTQA_MAX_IN_FLIGHT": "3", "PATH": "x"}
    read = Settings.from_environment({**environ, "BERTQA_REPOSITORY": "/models", "BERTQA_MAX_CONTEXTS": ""})
    assert (read.triton_urls, read.deadline_s, read.max_in_flight) == (("a:1", "b:2"), 2.5, 3)
    assert str(read.repository) == "/models"
    assert read == Settings.from_environment(environ).model_copy(update={"repository": read.repository})
    for name, value in (
        ("BERTQA_DEADLINE_S", "soon"),
        ("BERTQA_DEADLINE_S", "0"),
        ("BERTQA_DEADLINE_S", "nan"),
        ("BERTQA_MAX_IN_FLIGHT", "1.5"),
        ("BERTQA_MAX_IN_FLIGHT", "-1"),
        ("BERTQA_MAX_WAIT_S", "0"),
        ("BERTQA_MAX_MEMORY_MB", "0"),
        ("BERTQA_MAX_BODY_BYTES", "0"),
        ("BERTQA_TRITON_URL", "a:1,,b:2"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: "):
            Settings.from_environment({name: value})


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
    maker = WindowMaker(
        Tokenizer.from_str(bundle.maker.tokenizer_json()), max_seq_len=64, max_question_tokens=16, overlap=60
    )
    wide = Bundle("bert_qa", 7, manifest, maker)
    app = create_app(Settings(), engine=FakeEngine(manifest.identity), bundle=wide)
    with serving(app) as url, httpx.Client(base_url=url, trust_env=False) as client:
        for context in ("It was made at «Uber».", "It was made at «Uber». " * 300):
            reply = client.post("/v1/answer", json={"question": "who made it?", "context": context})
            assert reply.status_code == 200, reply.text
            assert reply.json()["answers"][0]["text"] == "Uber"
