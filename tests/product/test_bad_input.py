"""Test generated bad input in small numbers, and past findings: it is answered correctly, or its field is named."""

import gzip
import json
from collections.abc import Iterator

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api.errors import MalformedBody
from service.api.json_body import MAX_VALUES, parse_json
from service.app import create_app
from service.settings import Settings
from service.triton.errors import EngineBroken, EngineTimeout
from tests.chaos import bad_input, who_may_ask
from tests.chaos.bad_input import Reply, Service, check_refusal
from tests.chaos.report import table
from tests.chaos.toy_service import application
from tests.support.servers import serving
from tests.support.toy_model import FakeEngine, toy_bundle

JSON = ((b"content-type", b"application/json"),)
ASKED = {"question": "Who made it?", "context": "It was made at Uber."}
MB = 1 << 20


TARGETS = {**bad_input.TARGETS, **who_may_ask.TARGETS}
# atheris, which is not built for every Python, is for `make chaos`; here tests/bertqa/test_decoding.py draws the cases
TARGETS.pop("decoding", None)


@pytest.mark.parametrize("name", TARGETS)
def test_generated_input_is_refused_by_name_or_answered_right(name: str) -> None:
    target, share = TARGETS[name]
    row = target(max(int(share * 1_500), 6), 0)
    print(table([row]))
    assert row.is_kept, row.problems
    assert row.injected
    assert row.refused.total() + row.right == row.requests
    assert row.right


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    """One that takes large bodies."""
    with Service(application(max_body_bytes=32 * MB)).running() as running:
        yield running


def refused(reply: Reply, status: int, field: str | None = None) -> str:
    assert reply.status == status, reply.body[:500]
    assert check_refusal(reply) == field
    return str(reply.json()["error"])


LARGE = "x" * 10 * MB


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"question": LARGE}, "question"),
        ({"context": LARGE}, "context"),
        ({"context": "é" * 10 * MB}, "context"),
        ({"context": None, "contexts": [LARGE]}, "contexts"),
        ({"context": None, "contexts": ["x"] * 5_000}, "contexts"),
        ({"model": LARGE}, "model"),
        ({"offset_unit": LARGE}, "offset_unit"),
        ({"top_k": LARGE}, "top_k"),
        ({LARGE: 1}, "x" * 60),
        ({"top_k": [LARGE] * 2}, "top_k"),
        ({"context": None, "contexts": [1] * 10_000}, "contexts[0]"),
    ],
    ids=range(11),
)
def test_ten_megabytes_in_any_field(service: Service, fields: dict[str, object], field: str) -> None:
    body = json.dumps({**ASKED, **fields}, ensure_ascii=False)
    refused(service.ask(b"/v1/answer", body.encode(), JSON), 422, field)


def test_large_values_elsewhere(service: Service) -> None:
    for place in ("question", "context"):
        body = json.dumps({"inputs": {**ASKED, place: LARGE}}).encode()
        refused(service.ask(b"/", body, JSON), 422, f"inputs.{place}")
    refused(service.ask(b"/v1/answer", b'{"top_k": ' + b"9" * 10 * MB + b"}", JSON), 400)
    refused(service.ask(b"/v1/answer", b"[" * 10 * MB, JSON), 400)
    refused(service.ask(b"/v1/answer", b'"' + b"\\u0000" * MB + b'"', JSON), 422, "body")
    refused(service.ask(b"/v1/answer", b"x" * 40 * MB, JSON), 413)
    whole = json.dumps({"question": "who?", "contexts": ["word " * 300] * 64}).encode()
    reply = service.ask(b"/v1/answer", whole, JSON)
    assert reply.status == 200
    assert reply.json()["windows"] > 64 * 5


@pytest.mark.parametrize(
    "values",
    [b"[" + b"{}," * MB + b"{}]", b"[" + b'"",' * MB + b'""]', b'[{"a":"[,"},' * MB, b'"\\\\",' * MB, b'["\\"",' * MB],
    ids=range(5),
)
def test_a_body_of_too_many_values_is_refused_before_it_is_parsed(service: Service, values: bytes) -> None:
    for prefix in (b"", b'{"contexts": '):
        assert "at most 20,000 values in all its lists and objects" in refused(
            service.ask(b"/v1/answer", prefix + values, JSON), 400
        )


def test_values_are_counted_outside_of_texts(service: Service) -> None:
    texts = ["[{},[]," * 100, '"' * 500, "\\" * 500, '\\"' * 300, "{" * 900]
    body = json.dumps({"question": "who?", "contexts": texts * 12})
    assert len(body) > MAX_VALUES
    reply = service.ask(b"/v1/answer", body.encode(), JSON)
    assert reply.status == 200, reply.body
    for count, kept in ((MAX_VALUES, True), (MAX_VALUES + 1, False)):
        body = json.dumps([1] * count)
        if kept:
            assert parse_json(body.encode()) == [1] * count
        else:
            with pytest.raises(MalformedBody, match="at most 20,000 values in all its lists and objects"):
                parse_json(body.encode())


JSON_VALUES = st.recursive(
    st.text('a"\\[]{},:é') | st.integers(), lambda each: st.lists(each) | st.dictionaries(st.text('a"\\{,'), each)
)


@given(JSON_VALUES, st.booleans())
def test_as_many_values_are_counted_as_there_are(value: object, escaped: bool) -> None:
    def count(value: object) -> int:
        if not isinstance(value, list | dict):
            return 0
        return max(len(value), 1) + sum(map(count, value.values() if isinstance(value, dict) else value))

    body, values = json.dumps(value, ensure_ascii=escaped).encode(), count(value)
    if values:
        assert parse_json(body, max_values=values) == value
        with pytest.raises(MalformedBody, match="values in all its lists and objects"):
            parse_json(body, max_values=values - 1)


@pytest.mark.parametrize("depth", [50, 400, 700, 900, 930, 950, 970, 2_000, 200_000])
@pytest.mark.parametrize("name", ["context", "top_k", "offset_unit", "model", "unknown"])
def test_values_nested_at_any_depth(service: Service, depth: int, name: str) -> None:
    """The parser follows more deeply than `repr` does, which would say the value in an error."""
    nested = b"[" * depth + b"]" * depth
    reply = service.ask(b"/v1/answer", b'{"question": "who?", "%s": %s}' % (name.encode(), nested), JSON)
    if reply.status == 400:
        error = refused(reply, 400)
        assert ("values in all its lists and objects" if depth > MAX_VALUES else "nested too deeply") in error
    else:
        refused(reply, 422, "context" if name == "context" else reply.json()["field"])


@pytest.mark.parametrize(
    ("headers", "body", "said"),
    [
        ({"content-type": "application/json; charset=utf-16"}, b"", "charset must be utf-8"),
        ({"content-type": 'application/json;CHARSET="latin-1"'}, b"", "charset must be utf-8"),
        (
            {"content-type": "application/json", "content-encoding": "gzip"},
            gzip.compress(b"{}", mtime=0),
            "content-encoding",
        ),
        ({"content-type": "text/plain"}, b"", "got text/plain"),
    ],
)
def test_a_body_in_another_form_is_not_read(
    shared_client: httpx.Client, headers: dict[str, str], body: bytes, said: str
) -> None:
    reply = shared_client.post("/v1/answer", content=body or json.dumps(ASKED).encode(), headers=headers)
    assert reply.status_code == 415
    assert said in reply.json()["error"]


def test_a_name_that_is_empty_or_cannot_be_written(service: Service) -> None:
    refused(service.ask(b"/v1/answer", json.dumps({**ASKED, "": 1}).encode(), JSON), 422, '""')
    refused(service.ask(b"/v1/answer", json.dumps({**ASKED, "\ud800": 1}).encode(), JSON), 422, "body")


def test_the_query_string(service: Service) -> None:
    body = json.dumps({"inputs": ASKED}).encode()
    for query, field in ((b"top_k=1&top_k=2", "top_k"), (b"%00=1", "\0"), (b"top_k=%ff", "top_k"), (b"=", '""')):
        refused(service.ask(b"/predict?" + query, body, JSON), 422, field)
    assert service.ask(b"/predict?top_k=2&align_to_words=False", body, JSON).status == 200


def test_an_announced_length_of_any_size(service: Service) -> None:
    for length in (b"9" * 5_000, b"9" * 21, str(40 * MB).encode()):
        refused(service.ask(b"/v1/answer", b"{}", (*JSON, (b"content-length", length))), 413)


def test_ranges_are_ignored_and_all_methods_of_an_address_are_named(shared_client: httpx.Client) -> None:
    for path in ("/", "/static/index.html"):
        for range_ in ("bytes=9-1", "bytes=99999999-", "bytes=0-3", "x"):
            assert shared_client.get(path, headers={"range": range_}).status_code == 200
    assert shared_client.delete("/").headers["allow"] == "GET, HEAD, POST"


@pytest.mark.parametrize(
    "failure", [EngineBroken("output of another shape"), EngineTimeout("no answer in time")], ids=str
)
def test_the_errors_of_a_failing_engine_are_described_too(failure: Exception) -> None:
    bundle = toy_bundle()
    engine = FakeEngine(bundle.manifest.identity)
    app = create_app(Settings(), engine=engine, bundle=bundle)
    with serving(app) as url, httpx.Client(base_url=url, trust_env=False) as client:
        document = client.get("/openapi.json").json()
        engine.failure = failure
        for method, path, body in (
            ("POST", "/v1/answer", ASKED),
            ("POST", "/v1/answers", {"questions": [ASKED]}),
            ("POST", "/", {"inputs": ASKED}),
            ("POST", "/models/{model_id}", {"inputs": ASKED}),
            ("GET", "/health/ready", None),
        ):
            reply = client.request(method, path, json=body)
            described = document["paths"][path][method.lower()]["responses"][str(reply.status_code)]
            assert reply.status_code in (503, 504)
            schema = described["content"]["application/json"]["schema"]
            assert schema["$ref"] == "#/components/schemas/Problem"
            assert reply.json()["error_type"] in schema["properties"]["error_type"]["enum"]
            assert {"x-request-id"} <= described["headers"].keys() <= reply.headers.keys()
