"""Test the whole product as a user starts it: shipped checkpoint, builder, Triton, service, command line, browser."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bertqa.repository import Repository
from bertqa.squad import as_squad, read_squad
from tests.support.paths import CHECKPOINT, ROOT

BERTQA = Path(sys.executable).with_name("bertqa")
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever http_proxy says
CONTEXT = (
    "The Amazon rainforest covers most of the Amazon basin of South America. This basin encompasses 7,000,000 square "
    "kilometres, of which 5,500,000 square kilometres are covered by the rainforest. The majority of the forest is "
    "contained within Brazil, with 60% of the rainforest, followed by Peru with 13%."
)


@contextlib.contextmanager
def serving(repository: Path, directory: Path, *flags: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`bertqa serve` on free ports; gives its address once it says that it is ready."""
    command = [str(BERTQA), "serve", "--port", "0", "--triton-grpc-port", "0", "--repository", str(repository)]
    command += ["--log-dir", str(directory / "logs"), *flags]
    log = directory / "serve.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, text=True)
    try:
        for _ in range(6000):
            if match := re.search(r"ready at (http://\S+)", log.read_text()):
                break
            if process.poll() is not None:
                break
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
        assert match, log.read_text()
        yield match[1], process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The address of the running product, and the repository that it built for itself."""
    directory = tmp_path_factory.mktemp("product")
    repository = directory / "model_repository"
    with serving(repository, directory) as (url, _):
        yield url, repository


def post(url: str, path: str, body: object) -> Any:
    request = urllib.request.Request(
        url + path, json.dumps(body).encode(), {"content-type": "application/json"}, method="POST"
    )
    with DIRECT.open(request, timeout=30) as response:
        return json.load(response)


def bertqa(*words: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BERTQA), *words], input=stdin, capture_output=True, text=True, timeout=300, cwd=ROOT, check=False
    )


@pytest.mark.triton
@pytest.mark.slow
def test_a_question_is_answered_by_the_real_model(served: tuple[str, Path]) -> None:
    url, repository = served
    reply = post(url, "/v1/answer", {"question": "Which country holds most of the forest?", "context": CONTEXT})
    (answer,) = reply["answers"]
    assert answer["text"] == "Brazil"
    assert CONTEXT[answer["start"] : answer["end"]] == "Brazil"
    assert reply["has_answer"] is True
    assert reply["model"] == Repository(repository).open().manifest.identity


@pytest.mark.triton
@pytest.mark.slow
def test_the_answer_is_found_in_a_long_text_and_among_several(served: tuple[str, Path]) -> None:
    url, _ = served
    filler = "The harbour was quiet that day, and the ships lay still in the morning fog. " * 120
    reply = post(
        url,
        "/v1/answer",
        {"question": "Which country holds most of the forest?", "contexts": [filler, filler + CONTEXT + filler]},
    )
    (answer,) = reply["answers"]
    assert (answer["text"], answer["context_index"]) == ("Brazil", 1)
    assert answer["start"] == len(filler) + CONTEXT.index("Brazil")
    assert reply["windows"] > 10


@pytest.mark.triton
@pytest.mark.slow
def test_the_hugging_face_route_answers_too(served: tuple[str, Path]) -> None:
    url, _ = served
    reply = post(url, "/", {"inputs": {"question": "Which country holds most of the forest?", "context": CONTEXT}})
    assert (reply["answer"], reply["start"]) == ("Brazil", CONTEXT.index("Brazil"))


@pytest.mark.triton
@pytest.mark.slow
def test_the_served_path_scores_what_the_builder_measured(served: tuple[str, Path], tmp_path: Path) -> None:
    url, repository = served
    manifest = Repository(repository).open().manifest
    done = bertqa("evaluate", "--data", str(CHECKPOINT / "gate.json"), "--url", url, "--format", "json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["questions"] == manifest.gate_questions == 500
    assert result["f1"] == pytest.approx(manifest.f1, abs=0.3)
    assert result["f1"] > 70
    assert "question/s" not in done.stderr, "no progress bar where nobody watches"

    small = tmp_path / "small.json"
    small.write_text(json.dumps(as_squad(read_squad(CHECKPOINT / "gate.json")[:5])))
    failed = bertqa("evaluate", "--data", str(small), "--url", url, "--min-f1", "100.1")
    assert failed.returncode == 5
    assert "is below --min-f1 100.1" in failed.stderr


@pytest.mark.triton
@pytest.mark.slow
def test_the_command_line_asks(served: tuple[str, Path], tmp_path: Path) -> None:
    url, _ = served
    question = "How many square kilometres does the basin encompass?"
    piped = bertqa("ask", question, "--context", "-", "--url", url, stdin=CONTEXT)
    assert piped.returncode == 0, piped.stderr
    score, place, text = piped.stdout.split(maxsplit=2)
    assert text.startswith("7,000,000")
    assert 0 < float(score) <= 1
    start, end = map(int, place.split("-"))
    assert CONTEXT[start:end] == text.strip()

    file = tmp_path / "text.txt"
    file.write_text(CONTEXT, encoding="utf-8")
    whole = json.loads(
        bertqa("ask", question, "--context", str(file), "--url", url, "--format=json", "--top-k=3").stdout
    )
    assert len(whole["answers"]) == 3
    nothing = bertqa("ask", "Who wrote the novel Dracula?", "--context", str(file), "--url", url)
    assert (nothing.returncode, nothing.stdout) == (1, "")
    assert "does not seem to answer" in nothing.stderr


@pytest.mark.triton
@pytest.mark.slow
def test_readiness_and_identity_are_those_of_the_loaded_engine(served: tuple[str, Path]) -> None:
    url, repository = served
    with DIRECT.open(url + "/health/ready", timeout=10) as response:
        assert response.status == 200
    with DIRECT.open(url + "/info", timeout=10) as response:
        assert json.load(response)["model"] == Repository(repository).open().manifest.identity
    with DIRECT.open(url + "/metrics", timeout=10) as response:
        assert b"bertqa_" in response.read()


@pytest.mark.triton
@pytest.mark.slow
def test_another_tokenizer_in_the_bundle_is_refused_with_the_fix(served: tuple[str, Path], tmp_path: Path) -> None:
    _, repository = served
    spoiled = tmp_path / "repository"
    shutil.copytree(repository, spoiled, symlinks=True)
    tokenizer = next(spoiled.glob("bert_qa/*/tokenizer.json"))
    tokenizer.write_text(tokenizer.read_text().replace('"lowercase":true', '"lowercase":false'))
    log = tmp_path / "serve.log"
    with log.open("w") as output:
        done = subprocess.run(
            [str(BERTQA), "serve", "--port", "0", "--triton-grpc-port", "0", "--repository", str(spoiled)],
            cwd=tmp_path, stdout=output, stderr=output, timeout=120, check=False, env=os.environ,
        )  # fmt: skip
    assert done.returncode == 1
    assert "not the tokenizer that the engine was built with" in log.read_text()
    assert "python -m engine_builder" in log.read_text()


def test_bad_use_of_the_command_line_is_said_plainly(tmp_path: Path) -> None:
    missing = bertqa("ask", "who?", "--context", str(tmp_path / "none.txt"))
    assert missing.returncode == 2
    assert "none.txt" in missing.stderr
    unreachable = bertqa("ask", "who?", "--context", "-", "--url", "http://127.0.0.1:9", "--timeout=1", stdin="text")
    assert unreachable.returncode == 3
    assert "is `bertqa serve` running?" in unreachable.stderr
    malformed = tmp_path / "bad.json"
    malformed.write_text('{"data": [{}]}')
    refused = bertqa("evaluate", "--data", str(malformed))
    assert refused.returncode == 2
    assert "data[0]: the field 'paragraphs' is missing" in refused.stderr


@pytest.mark.triton
@pytest.mark.slow
def test_a_refused_request_ends_the_command_with_the_services_sentence(served: tuple[str, Path]) -> None:
    url, _ = served
    refused = bertqa("ask", "who?", "--context", "-", "--url", url, "--top-k", "1000", stdin="text")
    assert refused.returncode == 2
    assert "top_k" in refused.stderr
    assert "(status 422)" in refused.stderr
    with pytest.raises(urllib.error.HTTPError):
        post(url, "/v1/answer", {"question": "who?"})


@pytest.mark.triton
@pytest.mark.slow
def test_sigterm_ends_everything_in_order(served: tuple[str, Path], tmp_path: Path) -> None:
    _, repository = served
    with serving(repository, tmp_path) as (url, process):
        assert post(url, "/v1/answer", {"question": "Which country?", "context": CONTEXT})["answers"]
    assert process.returncode == 0
    assert (tmp_path / "serve.log").read_text().rstrip().endswith("ended")
