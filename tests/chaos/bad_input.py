"""Generate input for every route and field; each must be answered correctly, or refused with its field named.

No engine is needed: the real application runs in this process, with the shipped tokenizer and random logits, so that
answers can be anywhere. The requests of a row are its inputs; all are meant to be faults.
"""

import asyncio
import codecs
import contextlib
import gzip
import json
import math
import os
import re
import secrets
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, TypeVar
from urllib.parse import quote, unquote_to_bytes

import hypothesis
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import events, from_schema
from schemathesis.engine.recorder import ScenarioRecorder

from tests.chaos.report import Row, Size
from tests.chaos.toy_service import application
from tests.support.invariants import wrong_offsets, wrong_scores
from tests.support.paths import ROOT
from tests.support.servers import serving
from tests.support.texts import SURROGATES, TEXTS

ROUND = 2_000
"""Inputs per run of hypothesis, which is slow with more."""
REFUSALS = {400: "malformed_json", 413: "body_too_large", 415: "not_json", 422: "validation"}

T = TypeVar("T")
Json = Any


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply of the application."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Json:
        return json.loads(self.body)


class Service:
    """Call the application as a server does."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        self._loop = asyncio.new_event_loop()

    @contextlib.contextmanager
    def running(self) -> Iterator["Service"]:
        lifespan = self._app.router.lifespan_context(self._app)
        self._loop.run_until_complete(lifespan.__aenter__())
        try:
            yield self
        finally:
            self._loop.run_until_complete(lifespan.__aexit__(None, None, None))
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()

    def ask(self, target: bytes, body: bytes, headers: Sequence[tuple[bytes, bytes]], method: str = "POST") -> Reply:
        path, _, query = target.partition(b"?")
        scope: dict[str, object] = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": unquote_to_bytes(path).decode(errors="replace"),  # as in uvicorn
            "raw_path": path,
            "query_string": query,
            "root_path": "",
            "headers": headers,
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8000),
        }
        return self._loop.run_until_complete(self._call(scope, body))

    async def _call(self, scope: dict[str, object], body: bytes) -> Reply:
        sent: list[dict[str, Any]] = []
        unread = [body]

        async def receive() -> dict[str, object]:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            await asyncio.Event().wait()  # the client stays
            raise AssertionError

        async def send(message: Any) -> None:
            sent.append(message)

        await self._app(scope, receive, send)
        head = {name.decode().lower(): value.decode() for name, value in sent[0]["headers"]}
        return Reply(sent[0]["status"], head, b"".join(message.get("body", b"") for message in sent[1:]))


# ---- requests ------------------------------------------------------------------------------------------------------

QUESTIONS = TEXTS.map(lambda text: "who " + text[:900])
CONTEXTS = TEXTS.map("in ".__add__)
BLANK = st.text(st.sampled_from(" \t\r\n\x0b\x0c\x1c\x85\xa0\u2003\u2028\u3000"), max_size=9)
BAD_TEXTS = BLANK | SURROGATES

INTEGERS = st.integers() | st.sampled_from((-(2**63), 2**63, 2**64, 10**30, 10**400, -(10**4000)))
KINDS: Mapping[type, st.SearchStrategy[Json]] = {
    bool: st.booleans(),
    int: INTEGERS,
    float: st.floats(allow_nan=False, allow_infinity=False) | st.integers(-2, 300).map(float),
    str: TEXTS | SURROGATES,
    list: st.lists(st.none() | INTEGERS | TEXTS, max_size=4),
    dict: st.dictionaries(TEXTS, st.none() | INTEGERS | TEXTS, max_size=4),
    type(None): st.none(),
}


def none_of(*kinds: type) -> st.SearchStrategy[Json]:
    """JSON values of every other kind."""
    return st.one_of(*(values for kind, values in KINDS.items() if kind not in kinds))


def outside(low: int, high: int) -> st.SearchStrategy[int]:
    """Whole numbers, small and huge, that are not from ``low`` to ``high``."""
    return INTEGERS.filter(lambda number: not low <= number <= high) | st.sampled_from((low - 1, high + 1))


def is_text_of(values: Sequence[str]) -> Callable[[Json], bool]:
    return lambda value: isinstance(value, str) and value in values


Field = tuple[st.SearchStrategy[Json], st.SearchStrategy[Json]]
"""Valid values, and values that must be refused with the field's name."""

V1: Mapping[str, Field] = {
    "question": (QUESTIONS, none_of(str) | BAD_TEXTS | TEXTS.map(lambda text: text + "x" * 1001)),
    "context": (CONTEXTS, none_of(str) | BAD_TEXTS),
    "contexts": (
        st.lists(CONTEXTS, min_size=1, max_size=4),
        none_of(list, type(None))
        | st.just([])
        | st.tuples(st.lists(CONTEXTS, max_size=3), none_of(str) | BAD_TEXTS).map(lambda pair: [*pair[0], pair[1]])
        | CONTEXTS.map(lambda text: [text] * 65),
    ),
    "top_k": (st.integers(1, 100), none_of(int) | outside(1, 100)),
    "max_answer_tokens": (st.integers(1, 200), none_of(int) | outside(1, 200)),
    "overlap": (st.none() | st.integers(0, 44), none_of(int, type(None)) | outside(0, 61)),
    "no_answer": (st.booleans(), none_of(bool)),
    "offset_unit": (st.sampled_from(("codepoint", "utf16", "byte")), none_of(str) | TEXTS),
    "explain": (st.booleans(), none_of(bool)),
    "model": (st.sampled_from((None, "bert_qa")), none_of(str, type(None)) | TEXTS | SURROGATES),
}


def written(values: st.SearchStrategy[Json]) -> st.SearchStrategy[Json]:
    """The values as a query string writes them, too."""
    return values | values.map(lambda value: None if value is None else str(value))


def pipeline_numbers(low: int, high: int, *, refused_from: float) -> Field:
    """A number of the pipeline; it may be absent, and may be text."""
    wrong = written(INTEGERS.filter(lambda number: not low <= number < refused_from) | st.just(low - 1))
    return written(st.integers(low, high)) | st.none(), none_of(int, str, type(None)) | wrong | TEXTS


PIPELINE_FLAG: Field = (
    written(st.booleans()) | st.none(),
    none_of(bool, str, type(None)) | TEXTS,
)
PIPELINE: Mapping[str, Field] = {
    "top_k": pipeline_numbers(1, 100, refused_from=101),
    "doc_stride": pipeline_numbers(0, 10, refused_from=62),
    "max_answer_len": pipeline_numbers(1, 200, refused_from=201),
    "max_seq_len": pipeline_numbers(1, 512, refused_from=math.inf),  # clipped
    "max_question_len": pipeline_numbers(1, 12, refused_from=61),
    "handle_impossible_answer": PIPELINE_FLAG,
    "align_to_words": PIPELINE_FLAG,
}
INPUTS: Mapping[str, Field] = {name: V1[name] for name in ("question", "context")}


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, and the fields of which an error must name one; empty if it must be answered."""

    target: str
    body: Json
    blamed: frozenset[str]
    questions: tuple[Mapping[str, Json], ...] = ()  # as `wrong_offsets` takes them


OBJECT = ""
"""The object itself, which is named if a field's name cannot be written."""
SURROGATE = re.compile("[\ud800-\udfff]")


def at(place: str, wrong: Iterable[str]) -> frozenset[str]:
    """Return the fields by their names in the API."""
    return frozenset(".".join(filter(None, (place, name))) or "body" for name in wrong)


@st.composite
def objects(draw: st.DrawFn, fields: Mapping[str, Field], needed: Sequence[str]) -> tuple[dict[str, Json], set[str]]:
    """An object with the required fields and some others, and which of them are wrong: mostly one or none."""
    others = [name for name in fields if name not in needed]
    names = [*needed, *(draw(st.lists(st.sampled_from(others), unique=True)) if others else ())]
    wrong = set(draw(st.lists(st.sampled_from(names), max_size=2))) if names else set()
    found = {name: draw(fields[name][name in wrong]) for name in names}
    match draw(st.integers(0, 9)):
        case 0:
            name = draw(TEXTS | SURROGATES.map(lambda text: text[:50]))
            if name not in fields:
                found[name] = draw(none_of())
                wrong.add(OBJECT if SURROGATE.search(name) else f"{name:.60}" or '""')
        case 1 if needed:
            name = draw(st.sampled_from(needed))
            del found[name]
            wrong.add(name)
    return found, wrong


V1_OBJECTS = st.sampled_from((("context", "contexts"), ("contexts", "context"))).flatmap(
    lambda pair: objects({name: V1[name] for name in V1 if name != pair[1]}, ("question", pair[0]))
)


@st.composite
def v1_requests(draw: st.DrawFn) -> Asked:
    """Requests of ``/v1/answer`` and ``/v1/answers``."""
    if draw(st.booleans()):
        body, wrong = draw(V1_OBJECTS)
        return Asked("/v1/answer", body, at("", _or_context(wrong)), (body,))
    drawn = draw(st.lists(V1_OBJECTS, min_size=1, max_size=3))
    blamed = frozenset().union(*(at(f"questions[{n}]", _or_context(wrong)) for n, (_, wrong) in enumerate(drawn)))
    bodies = [body for body, _ in drawn]
    return Asked("/v1/answers", {"questions": bodies}, blamed, tuple(bodies))


def _or_context(wrong: set[str]) -> set[str]:
    return wrong | {"context"} if "contexts" in wrong else wrong  # without either, the error names `context`


@st.composite
def pipeline_requests(draw: st.DrawFn) -> Asked:
    """Requests of the Hugging Face routes."""
    parameters, wrong = draw(objects(PIPELINE, ()))
    path = draw(st.sampled_from(("/", "/predict", "/models/")))
    if path == "/models/":
        path += quote(draw(TEXTS).replace("\n", "") or "x", errors="replace")  # paths have no line breaks
    blamed = at("parameters", wrong)
    body: dict[str, Json] = {}
    if draw(st.integers(0, 3)):
        body["parameters"] = parameters
    elif parameters and not any(value is None or isinstance(value, list | dict) for value in parameters.values()):
        texts = {name: str(value) for name, value in parameters.items()}
        path += "?" + "&".join(f"{quote(n, errors='replace')}={quote(v, errors='replace')}" for n, v in texts.items())
        if wrong:  # written as text, a wrong value may become right: 2.0 stays wrong, and `true` does not
            return Asked(path, {"inputs": {"question": "who", "context": "in"}}, frozenset({"?"}))
        blamed = frozenset()
    else:
        blamed, parameters = frozenset(), {}
    if draw(st.booleans()):
        body["inputs"], wrong = draw(objects(INPUTS, ("question", "context")))
        blamed |= at("inputs", wrong)
        asked = [body["inputs"]]
    else:
        drawn = draw(st.lists(objects(INPUTS, ("question", "context")), min_size=1, max_size=3))
        body["instances"] = asked = [instance for instance, _ in drawn]
        blamed = blamed.union(*(at(f"instances[{n}]", wrong) for n, (_, wrong) in enumerate(drawn)))
    return Asked(path, body, blamed, tuple(asked))


BODIES: tuple[tuple[str, Json], ...] = (
    ("/v1/answer", {"question": "who wrote it?", "context": "Ada wrote it in London.", "top_k": 2}),
    ("/v1/answer", {"question": "qui l'a écrit ?", "contexts": ["Ada l'a écrit à 서울 😀.", "Rien."], "explain": True}),
    ("/v1/answers", {"questions": [{"question": "who?", "context": "Ada"}, {"question": "where?", "context": "Uber"}]}),
    ("/", {"inputs": {"question": "who?", "context": "Ada wrote it."}, "parameters": {"top_k": 2}, "options": {}}),
    ("/predict", {"instances": [{"question": "who?", "context": "Ada wrote it."}]}),
)
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32", "latin-1", "cp1252", "utf-7", "cp037", "shift_jis")
CONTENT_TYPES = (
    *("application/json", "application/json; charset=utf-8", 'application/ld+json;charset="UTF-8"', "APPLICATION/JSON"),
    *("application/json; charset=utf-16", "application/json;charset=latin-1", "text/json", "text/plain", "", "/", ";"),
    *("multipart/form-data; boundary=x", "application/x-www-form-urlencoded", "application/jsonp", "*/*", "é", "\0"),
)
SPLICES = (
    *(b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-0", b"01", b"9" * 5000, b"1." + b"0" * 400, b"1e-999", b"\xff"),
    *(
        b"\xed\xa0\x80",
        b"\xc0\xaf",
        b"\xf4\x90\x80\x80",
        b"\xef\xbb\xbf",
        b"\\ud800",
        b"\\u0000",
        b"\\x",
        b'"',
        b"{",
        b"]",
    ),
    *(b"[" * 200 + b"]" * 200, b"[" * 960 + b"]" * 960, b'{"a":' * 960 + b"1" + b"}" * 960, b"[" * 5000),
    *(
        b'"question": "x",',
        b'"top_k": 1,',
        b"/*",
        b"//",
        b",",
        b"'",
        b"\0",
        b"\r",
        b"\\",
        b"null",
        b"true",
        b"{}",
        b"[]",
    ),
)


@dataclass(frozen=True, slots=True)
class Raw:
    """A request as bytes."""

    target: str
    body: bytes
    headers: tuple[tuple[bytes, bytes], ...]


@st.composite
def raw_requests(draw: st.DrawFn) -> Raw:
    """Valid bodies in other encodings, truncated, with flipped bits or inserted bytes."""
    target, value = draw(st.sampled_from(BODIES))
    encoding = draw(st.sampled_from(ENCODINGS) if draw(st.booleans()) else st.just("utf-8"))
    text = json.dumps(value, ensure_ascii=draw(st.booleans()))
    body = codecs.encode(text, encoding, "replace")
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.integers(0, len(body)))
        match draw(st.integers(0, 4)):
            case 0:
                body = body[:place]
            case 1:
                body = body[:place] + bytes([body[place] ^ 1 << draw(st.integers(0, 7))]) + body[place + 1 :] \
                    if place < len(body) else body  # fmt: skip
            case 2:
                body = body[:place] + draw(st.binary(max_size=8)) + body[place:]
            case _:
                place = body.find(b'"', place) if draw(st.booleans()) else body.find(b": ", place) + 2
                body = body[:place] + draw(st.sampled_from(SPLICES)) + body[place:]
    headers = [
        (b"content-type", draw(st.sampled_from(CONTENT_TYPES)).encode() if draw(st.booleans()) else b"application/json")
    ]
    match draw(st.integers(0, 9)):
        case 0:
            body = gzip.compress(body, mtime=0)
        case 1:
            body = gzip.compress(body, mtime=0)
            headers.append((b"content-encoding", b"gzip"))
        case 2:
            headers.append((b"content-encoding", draw(st.sampled_from((b"br", b"identity", b"gzip, br", b"")))))
    return Raw(target, body, tuple(headers))


HEADER_BYTES = st.binary(max_size=200).map(
    lambda value: value.replace(b"\r", b"").replace(b"\n", b"")
) | st.sampled_from(
    (
        b"1",
        b"0",
        b"-1",
        b"1e3",
        b"1.5",
        b" 5",
        b"\xb2",
        b"9" * 9,
        b"9" * 10,
        b"9" * 5000,
        b"0x10",
        b"\xff\xfe",
        b"a" * 9000,
    )
)
HEADER_NAMES = (
    *(b"x-timeout-ms", b"x-request-id", b"x-amzn-trace-id", b"traceparent", b"tracestate", b"authorization", b"cookie"),
    *(b"content-length", b"accept", b"accept-encoding", b"host", b"range", b"expect", b"origin", b"x-forwarded-for"),
    *(b"if-none-match", b"transfer-encoding", b"content-language", b"x-api-key", b"forwarded", b"te", b"upgrade"),
)


@st.composite
def raw_headers(draw: st.DrawFn) -> Raw:
    """A valid body with arbitrary headers."""
    target, value = draw(st.sampled_from(BODIES))
    pairs = draw(st.lists(st.tuples(st.sampled_from(HEADER_NAMES), HEADER_BYTES), max_size=4))
    return Raw(target, json.dumps(value).encode(), ((b"content-type", b"application/json"), *pairs))


# ---- replies -------------------------------------------------------------------------------------------------------


def check_refusal(reply: Reply, refusals: Mapping[int, str] = REFUSALS) -> str | None:
    """Check that a reply has the API's error format and one of these types; return the named field.

    Raises:
        AssertionError: the reply is something else.
    """
    said = reply.json()
    assert reply.status in refusals, (reply.status, said)
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["x-request-id"]
    assert said.keys() == {"error", "error_type", "field"}
    assert said["error_type"] == refusals[reply.status]
    assert len(reply.body) < 4_000
    field: str | None = said["field"]
    assert (field is not None) == (reply.status == 422), said
    assert field is None or said["error"].startswith(f"{field}: "), said
    assert said["error"].strip()
    return field


def check_answers(target: str, questions: Sequence[Mapping[str, Json]], reply: Reply, row: Row) -> None:
    """Check that the spans of a reply with status 200 are pieces of the texts, in the requested unit."""
    said = reply.json()
    if target.startswith("/v1"):
        results = said["results"] if target == "/v1/answers" else [said]
        problems = [
            w for pair in zip(questions, results, strict=True) for w in (*wrong_offsets(*pair), *wrong_scores(*pair))
        ]
    else:
        results = said["predictions"] if isinstance(said, dict) and "predictions" in said else [said]
        problems = []
        for question, result in zip(questions, results, strict=True):
            for span in result if isinstance(result, list) else [result]:
                if question["context"][span["start"] : span["end"]] != span["answer"] or not 0 <= span["score"] <= 1:
                    problems.append(str(span))
    row.right += 1
    row.wrong += bool(problems)
    assert not problems, problems


def check(row: Row, reply: Reply, refusals: Mapping[int, str] = REFUSALS) -> None:
    """Count a reply; replies that are neither an answer nor a refusal are lost."""
    row.requests += 1
    row.injected += 1
    if reply.status != 200:
        row.refused[f"{reply.status} {refusals.get(reply.status, '')}".strip()] += 1
        row.lost += reply.status >= 500
        assert reply.status < 500, (reply.status, reply.body[:1_000])


def ask_and_check(service: Service, row: Row, asked: Asked) -> None:
    """Check a request with a known outcome."""
    reply = service.ask(
        asked.target.encode(), json.dumps(asked.body).encode(), ((b"content-type", b"application/json"),)
    )
    check(row, reply)
    if reply.status == 200:
        assert not asked.blamed or asked.blamed == {"?"}, (asked.blamed, reply.body[:200])
        check_answers(asked.target.partition("?")[0], asked.questions, reply, row) if asked.questions else None
        return
    field = check_refusal(reply)
    assert field is not None, reply.body
    assert asked.blamed == {"?"} or any(field == name or field.startswith(f"{name}[") for name in asked.blamed), (
        asked.blamed,
        reply.body,
    )


def ask_raw(service: Service, row: Row, raw: Raw) -> None:
    """Check a request that must be refused, or answered correctly as Python's JSON parser reads it."""
    reply = service.ask(raw.target.encode(), raw.body, raw.headers)
    check(row, reply)
    if reply.status != 200:
        check_refusal(reply)
        return
    body = json.loads(raw.body.decode("utf-8-sig"))
    match raw.target:
        case "/v1/answer":
            questions = [body]
        case "/v1/answers":
            questions = body["questions"]
        case _:
            questions = [body["inputs"]] if body.get("inputs") else body["instances"]
    check_answers(raw.target, questions, reply, row)


def explore(row: Row, inputs: st.SearchStrategy[T], examine: Callable[[T], None], count: int, seed: int) -> Row:
    """Examine ``count`` generated inputs; the first that breaks a promise is minimized and reported."""
    while row.requests < count and not row.problems:

        @hypothesis.seed(seed + row.requests)
        @hypothesis.settings(
            max_examples=min(ROUND, count - row.requests),
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        @hypothesis.given(inputs)
        def run(each: T) -> None:
            examine(each)

        before = row.requests
        try:
            run()
        except Exception as error:
            row.lost = max(row.lost, 1)
            row.problems.append("".join(traceback.format_exception_only(error)).strip())
        if row.requests == before:
            raise AssertionError(f"{row.fault}: nothing was generated")
    return row


def _generated(
    name: str, inputs: st.SearchStrategy[T], examine: Callable[[Service, Row, T], None]
) -> Callable[[int, int], Row]:
    def run(count: int, seed: int) -> Row:
        row = Row(fault=f"{name}, generated")
        with Service(application()).running() as service:
            return explore(row, inputs, lambda each: examine(service, row, each), count, seed)

    return run


def fuzzed(count: int, seed: int) -> Row:
    """Fuzz windows, spans and graphemes with `tests.chaos.fuzz_decoding`, in a separate process."""
    row = Row(fault="windows, spans and graphemes, fuzzed by atheris")
    with tempfile.TemporaryDirectory() as directory:
        done = subprocess.run(
            [sys.executable, "-m", "tests.chaos.fuzz_decoding", str(count), str(seed)],
            cwd=directory,  # libFuzzer writes the failing input there
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120 + count / 100,
            check=False,
        )
    counts = json.loads(next((line for line in done.stdout.splitlines() if line.startswith("{")), "{}"))
    row.requests = row.injected = counts.get("inputs", 0)
    row.refused["ValueError"] = counts.get("refused", 0)
    row.right = row.requests - row.refused["ValueError"]
    if done.returncode or row.requests < count:
        row.lost = 1
        row.problems.append(f"{done.stdout[-1_000:]}\n{done.stderr[-3_000:]}")
    return row


def described(count: int, seed: int, *, key: str = "", **settings: object) -> Row:
    """Check OpenAPI with all checks of schemathesis, with the given number of cases per operation.

    A schema cannot say everything, so valid data may be refused with 422: a text of only white space, both ``context``
    and ``contexts``, an unknown model.
    """
    row = Row(fault=f"OpenAPI{' of a guarded service' if key else ''}, by schemathesis")
    config = SchemathesisConfig.from_dict(
        {
            "seed": seed,
            "auth": {"openapi": {"api_key": {"bearer": key}}} if key else {},
            "continue-on-failure": True,
            "generation": {"max-examples": count, "database": "none"},
            "phases": {"stateful": {"enabled": False}},
            "checks": {
                "positive_data_acceptance": {"expected-statuses": ["2xx", 422]},
                # Open routes are open only to GET: other methods need a key before they get 405.
                "unsupported_method": {"enabled": not key},
            },
        }
    )
    with serving(application(**settings)) as url:
        engine = from_schema(schemathesis.openapi.from_url(f"{url}/openapi.json", config=config))
        for event in engine.execute():
            if isinstance(event, events.NonFatalError):
                row.problems.append(f"{event.label}: {event.value!r}")
            elif isinstance(event, events.FatalError):
                row.problems.append(repr(event.exception))
            elif isinstance(event, events.ScenarioFinished):
                _count(row, event.recorder)
    return row


def _count(row: Row, recorder: ScenarioRecorder) -> None:
    for interaction in recorder.interactions.values():
        status = interaction.response.status_code if interaction.response else 0
        row.requests += 1
        row.injected += 1
        row.right += status == 200
        row.lost += status >= 500 or status == 0
        if status != 200:
            row.refused[f"{status} {REFUSALS.get(status, '')}".strip()] += 1
    for checks in recorder.checks.values():
        for failed in (each.failure_info for each in checks if each.failure_info):
            row.problems.append(f"{recorder.label}: {failed.failure.title}: {failed.code_sample}")


Targets = Mapping[str, tuple[Callable[[int, int], Row], float]]
"""A target, run with a number of inputs and a seed, and its share of all inputs."""
TARGETS: Targets = {
    "v1": (_generated("fields of /v1", v1_requests(), ask_and_check), 0.08),
    "hugging_face": (_generated("fields of Hugging Face", pipeline_requests(), ask_and_check), 0.06),
    "bodies": (_generated("bodies", raw_requests(), ask_raw), 0.1),
    "headers": (_generated("headers", raw_headers(), ask_raw), 0.05),
    "openapi": (described, 0.001),
    "decoding": (fuzzed, 0.6),
}


def bad_input(size: Size) -> Iterator[Row]:
    """A row for each target."""
    yield from generate(TARGETS, size)


def generate(targets: Targets, size: Size) -> Iterator[Row]:
    """Return a row for each target; the printed seed reproduces what was found."""
    seed = secrets.randbelow(1 << 31)
    print(f"bad input: seed {seed}", file=sys.stderr)
    for name, (target, share) in targets.items():
        if name == "decoding" and find_spec("atheris") is None:
            print("bad input: atheris is not installed, decoding is not fuzzed", file=sys.stderr)
            continue
        yield target(max(int(share * size.inputs), 5), seed)
