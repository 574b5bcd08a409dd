"""Test the logs of the service in a separate process; questions and contexts must never be logged."""

import contextlib
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import httpx
import pytest

from bertqa.manifest import MODEL_NAME, Bundle
from bertqa.repository import Repository
from service.observability import logging as logs
from service.runtime.ports import hold_port
from tests.support.paths import ROOT
from tests.support.repositories import publish_toy_bundle
from tests.support.waiting import until

CANARY = "Kanarienvogel"
ASKED = {"question": f"Who is {CANARY}?", "context": f"It was made at «{CANARY}»."}

# The real application with the toy engine, in which a question's first word is the fault to happen.
FAULTY = """
import asyncio, os, threading, warnings
import service.inference.pipeline as answering
from tests.support.toy_model import FakeEngine
from service.app import create_app
from service.triton.errors import EngineBroken, EngineOverloaded, EngineTimeout, EngineUnavailable

known = {"unavailable": EngineUnavailable, "late": EngineTimeout, "shed": EngineOverloaded}
decode = answering.decode

class Unraisable:
    def __del__(self):
        raise KeyError(self.text)

def faulty(documents, logits, **options):
    text = documents[0].context
    fault = text.split()[0]
    if fault == "broken":
        raise EngineBroken("as asked", detail=text)
    if fault in known:
        raise known[fault]("as asked")
    if fault == "bug":
        try:
            raise LookupError(text)
        except LookupError as error:
            raise RuntimeError(text) from error
    if fault == "warning":
        warnings.warn(text)
    if fault == "thread":
        thread = threading.Thread(target=lambda: int(text))
        thread.start()
        thread.join()
    if fault == "unraisable":
        Unraisable().text = text
    if fault == "task":
        async def fail():
            raise ValueError(text)
        asyncio.get_running_loop().create_task(fail())
    return decode(documents, logits, **options)

answering.decode = faulty

def app():
    return create_app(engine=FakeEngine(os.environ["IDENTITY"]))
"""


@pytest.fixture(scope="module")
def directory(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a repository of the toy model, and the module `faulty`."""
    directory = tmp_path_factory.mktemp("logs")
    repository = Repository(directory / "models")
    publish_toy_bundle(repository, bundle)
    repository.activate(MODEL_NAME, bundle.version)
    (directory / "faulty.py").write_text(FAULTY)
    return directory


@contextlib.contextmanager
def serving(
    directory: Path, identity: str, stderr: IO[bytes], **environment: str
) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    held = hold_port("127.0.0.1", 0, "--port")
    port = held.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "--factory", "faulty:app", f"--port={port}", "--log-level=info"]
    own = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, directory))), "IDENTITY": identity}
    own |= {"BERTQA_REPOSITORY": str(directory / "models")}
    with (
        held,
        subprocess.Popen(
            [*command, "--no-access-log"],
            env={**os.environ, **own, **environment},
            stdout=stderr,
            stderr=stderr,
        ) as process,
    ):
        try:
            url, end = f"http://127.0.0.1:{port}", time.monotonic() + 60
            while not is_ready(url):
                assert process.poll() is None, "it ended"
                assert time.monotonic() < end
                time.sleep(0.05)
            yield url, process
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) in (0, -signal.SIGTERM)  # a single process passes it on to itself
        finally:
            process.kill()


def is_ready(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{url}/health/ready", trust_env=False, timeout=30).status_code == 200
    return False


def go_wrong(url: str) -> list[int]:
    """Every way that a request can end, each with the canary in question, context or wherever else a client may put it;
    the statuses."""
    statuses = []
    with httpx.Client(base_url=url, trust_env=False, timeout=30, headers={"x-request-id": "the-request"}) as client:

        def post(body: object, path: str = "/v1/answer", **options: Any) -> None:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            headers = {"content-type": "application/json"} | options.pop("headers", {})
            statuses.append(client.post(path, content=content, headers=headers, **options).status_code)

        post(ASKED)
        faults = ("unavailable", "late", "broken", "shed", "bug", "warning", "thread", "unraisable", "task")
        for fault in faults:
            post(ASKED | {"context": f"{fault} «{CANARY}»"})
        post({"questions": [ASKED, ASKED | {"context": f"bug {CANARY}"}]}, "/v1/answers")
        post({"inputs": ASKED}, f"/models/{CANARY}")
        post({"inputs": ASKED, "parameters": {CANARY: 1}}, "/")
        post(ASKED | {CANARY: CANARY})
        post(ASKED | {"model": CANARY})
        post(ASKED | {"question": CANARY * 1000})
        post(ASKED | {"question": [CANARY]})
        post(ASKED | {"question": "\ud800" + CANARY})
        post(b'{"question": "' + CANARY.encode())
        post(b"\xff" + CANARY.encode())
        post(b'{"question": "' + CANARY.encode() * 300_000)
        post(ASKED, headers={"content-type": f"text/{CANARY}"})
        post(ASKED, headers={"x-timeout-ms": CANARY})
        post(ASKED, f"/{CANARY}")
        statuses.append(client.get(f"/v1/answer?question={CANARY}").status_code)
        statuses.append(client.get(f"/static/{CANARY}").status_code)
    address = httpx.URL(url)
    body = json.dumps(ASKED)
    for raw in (
        f"GET /{CANARY} {CANARY}\r\n{CANARY}\r\n\r\n",
        "POST /v1/answer HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body) + 9}\r\n\r\n{body}",  # and goes away
        f"GET / HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: {CANARY}\r\n\r\n",
    ):
        with socket.create_connection((address.host, address.port or 80), timeout=10) as connection:
            connection.sendall(raw.encode())
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass
    return statuses


@pytest.mark.parametrize("form", ["json", "text"])
def test_no_question_and_no_context_is_in_any_log(directory: Path, bundle: Bundle, form: str) -> None:
    path = directory / f"{form}.log"
    with path.open("wb") as log, serving(directory, bundle.manifest.identity, log, BERTQA_LOG_FORMAT=form) as (url, _):
        statuses = go_wrong(url)
    text = path.read_text()
    assert {200, 400, 404, 405, 413, 415, 422, 500, 503, 504} <= set(statuses)
    assert CANARY.lower() not in text.lower()
    for sign in (  # each fault is in the log all the same
        "RuntimeError",
        "LookupError",
        "UserWarning",
        "a thread ended by an exception",
        "an exception that could not be raised",
        "Task exception was never retrieved",
        "Invalid HTTP request received",
        "engine_unavailable: as asked",
        "engine_broken: as asked",
    ):
        assert sign in text, sign
    if form == "json":  # every line, from the application's start on
        lines = [json.loads(line) for line in text.splitlines() if not line.startswith("INFO: ")]
        assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"]) for line in lines)
        assert all(line.keys() >= {"level", "logger", "message"} for line in lines)
        assert {line["logger"] for line in lines} >= {"bertqa.service", "bertqa.access", "uvicorn.error", "asyncio"}
        bug = next(line for line in lines if "RuntimeError" in line.get("exception", ""))
        assert bug["request_id"] == "the-request"
        assert bug["message"] == "POST /v1/answer: request the-request failed"
        accesses = [line for line in lines if line["logger"] == "bertqa.access"]
        assert [line["status"] for line in accesses][: len(statuses)] == statuses
        assert not [line for line in accesses if line["route"].startswith("/health")]
        assert sum(line["status"] in (None, 499) for line in accesses) == 1, "of the one that went away"


def test_texts_are_logged_where_that_is_asked_for(directory: Path, bundle: Bundle) -> None:
    path = directory / "texts.log"
    options = {"BERTQA_LOG_FORMAT": "json", "BERTQA_LOG_TEXTS": "true"}
    with path.open("wb") as log, serving(directory, bundle.manifest.identity, log, **options) as (url, _):
        go_wrong(url)
    lines = [json.loads(line) for line in path.read_text().splitlines() if not line.startswith("INFO: ")]
    first = next(line for line in lines if line["logger"] == "bertqa.access")
    assert first["questions"] == [{"question": ASKED["question"], "contexts": [ASKED["context"]]}]
    (bug, *_) = (line for line in lines if "RuntimeError" in line.get("exception", ""))
    assert f"RuntimeError: bug «{CANARY}»" in bug["exception"]
    assert f"POST /v1/answer: engine_broken: as asked: broken «{CANARY}»" in [line["message"] for line in lines]


def test_a_line_for_a_request_says_how_it_went(directory: Path, bundle: Bundle) -> None:
    path = directory / "access.log"
    body = json.dumps({"questions": [ASKED, ASKED]}).encode()
    with (
        path.open("wb") as log,
        serving(directory, bundle.manifest.identity, log, BERTQA_LOG_FORMAT="json") as (url, _),
    ):
        headers = {"content-type": "application/json", "x-request-id": "mine"}
        reply = httpx.post(f"{url}/v1/answers", content=body, headers=headers, trust_env=False)
        unnamed = httpx.post(f"{url}/v1/answer", json={}, trust_env=False)
        httpx.get(f"{url}/metrics", trust_env=False)
    line, failed = (json.loads(line) for line in path.read_text().splitlines() if '"bertqa.access"' in line)
    seconds = {name: line.pop(f"{name}seconds") for name in ("", "tokenize_", "infer_", "decode_")}
    assert all(0 < value < 30 for value in seconds.values())
    assert seconds[""] > max(seconds[name] for name in ("tokenize_", "infer_", "decode_"))
    del line["time"]
    assert line == {
        "level": "info",
        "logger": "bertqa.access",
        "message": "POST /v1/answers 200",
        "request_id": "mine",
        "method": "POST",
        "route": "/v1/answers",
        "status": 200,
        "error_type": None,
        "received_bytes": len(body),
        "sent_bytes": len(reply.content),
        "model": bundle.manifest.identity,
        "windows": 2,
    }
    assert (failed["status"], failed["error_type"]) == (422, "validation")
    assert failed["request_id"] == unnamed.headers["x-request-id"]
    assert "windows" not in failed


def test_level_and_lines_for_requests_can_be_chosen(directory: Path, bundle: Bundle) -> None:
    path = directory / "quiet.log"
    options = {"BERTQA_ACCESS_LOG": "off", "BERTQA_LOG_LEVEL": "error"}
    with path.open("wb") as log, serving(directory, bundle.manifest.identity, log, **options) as (url, _):
        for fault in ("fine", "late", "bug"):
            httpx.post(f"{url}/v1/answer", json=ASKED | {"context": f"{fault} x"}, trust_env=False)
    lines = [line for line in path.read_text().splitlines() if " bertqa." in line]
    assert len(lines) == 1
    assert "ERROR bertqa.service POST /v1/answer: request" in lines[0]


def lost(url: str) -> float:
    text = httpx.get(f"{url}/metrics", trust_env=False).text
    found = re.search(r"^bertqa_log_records_lost_total (\S+)$", text, re.MULTILINE)
    assert found
    return float(found[1])


def ask(url: str, times: int) -> None:
    with httpx.Client(base_url=url, trust_env=False, timeout=30) as client:
        for _ in range(times):
            assert client.post("/v1/answer", json=ASKED).status_code == 200


def test_a_log_on_a_full_disk_loses_lines_and_no_request(directory: Path, bundle: Bundle) -> None:
    with open("/dev/full", "wb") as full, serving(directory, bundle.manifest.identity, full) as (url, _):
        ask(url, 20)
        until(lambda: lost(url) >= 20)


def test_a_log_whose_reader_has_gone_loses_lines_and_no_request(directory: Path, bundle: Bundle) -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "wb") as log, serving(directory, bundle.manifest.identity, log) as (url, _):
        os.close(reader)
        ask(url, 20)
        until(lambda: lost(url) >= 20)


def test_a_log_that_nobody_reads_holds_up_no_request(directory: Path, bundle: Bundle) -> None:
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb"), os.fdopen(writer, "wb") as log:
        options = {"BERTQA_LOG_TEXTS": "true", "BERTQA_MAX_QUESTION_CHARS": "100000"}
        with serving(directory, bundle.manifest.identity, log, **options) as (url, _):
            question = {"question": "x" * 50_000, "context": "y"}  # each line is most of what the pipe takes
            for _ in range(8):
                assert httpx.post(f"{url}/v1/answer", json=question, trust_env=False, timeout=30).status_code == 200


def test_what_is_lost_is_told_as_soon_as_there_is_room(capfd: pytest.CaptureFixture[str]) -> None:
    counted: list[int] = []
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    handler = logs.LineWriter(writer, count_lost=counted.append)
    handler.setFormatter(logs.JsonFormatter(texts=False))
    record = logging.LogRecord("bertqa.service", logging.INFO, "", 0, "x" * 1_000_000, None, None)
    for _ in range(40):
        handler.handle(record)
    assert sum(counted) >= 40 - 32, "more than is kept"
    received = bytearray()

    def read() -> None:
        while chunk := os.read(reader, 1 << 20):
            received.extend(chunk)

    thread = threading.Thread(target=read)
    thread.start()
    handler.handle(logging.LogRecord("bertqa.service", logging.INFO, "", 0, "%d", ("no number",), None))
    handler.flush()
    os.close(writer)
    thread.join()
    os.close(reader)
    messages = [json.loads(line)["message"] for line in received.decode().splitlines()]
    told = [re.fullmatch(r"(\d+) log records were lost", message) for message in messages]
    assert sum(int(match[1]) for match in told if match) == sum(counted)
    assert sum(match is None for match in told) == 41 - sum(counted)
    assert capfd.readouterr().err == "", "logging complains of nothing itself"


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("BERTQA_LOG_FORMAT", "xml", "must be one of json, text; got 'xml'"),
        ("BERTQA_LOG_LEVEL", "loud", "must be one of debug, info, warning, error; got 'loud'"),
        ("BERTQA_LOG_TEXTS", "maybe", "must be true or false; got 'maybe'"),
    ],
)
def test_launcher_names_a_bad_setting(name: str, value: str, problem: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "service"],
        cwd=ROOT,
        env={**os.environ, name: value},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (2, f"bertqa: error: {name}: {problem}\n")


def test_triton_alone_in_its_container_needs_no_package_of_the_service() -> None:
    program = "import sys, service.runtime.triton; print({'grpc', 'starlette', 'numpy'} & sys.modules.keys())"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "set()\n"
