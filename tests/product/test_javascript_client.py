"""Test the Hugging Face routes with the npm package @huggingface/inference, as its users call it."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from service.triton.errors import EngineUnavailable
from tests.support.toy_model import FakeEngine

CONTEXT = "😀 e\u0301 Horovod was made at «Uber»."


def ask(packages: Path, endpoint: str, request: dict[str, Any], client: str = "InferenceClient") -> dict[str, Any]:
    # The client repeats a 503 for ever and without a pause, unless it is told not to.
    call = {"client": client, "endpointUrl": endpoint, "request": request, "options": {"retry_on_error": False}}
    done = subprocess.run(
        ["node", "ask.mjs", json.dumps(call)], cwd=packages, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    reply: dict[str, Any] = json.loads(done.stdout)
    return reply


@pytest.mark.parametrize("client", ["InferenceClient", "HfInference"])
def test_answer_has_the_contracts_types(javascript_packages: Path, url: str, client: str) -> None:
    request = {"inputs": {"question": "Where was Horovod made?", "context": CONTEXT}}

    answer = ask(javascript_packages, url, request, client)["answer"]

    assert answer["answer"] == "Uber"
    assert CONTEXT[answer["start"] : answer["end"]] == "Uber"  # code points, as from Hugging Face
    assert 0.5 < answer["score"] <= 1


@pytest.mark.parametrize("path", ["/predict", "/models/deepset/roberta-base-squad2"])
def test_every_path_that_the_client_may_be_pointed_at(javascript_packages: Path, url: str, path: str) -> None:
    request = {"inputs": {"question": "Where?", "context": CONTEXT}}

    assert ask(javascript_packages, url + path, request)["answer"]["answer"] == "Uber"


def test_a_list_is_understood_and_its_first_given(javascript_packages: Path, url: str) -> None:
    request = {"inputs": {"question": "Where?", "context": CONTEXT}, "parameters": {"top_k": 3}}

    assert ask(javascript_packages, url, request)["answer"]["answer"] == "Uber"


def test_no_answer_is_no_malformed_response(javascript_packages: Path, url: str) -> None:
    request = {
        "inputs": {"question": "Who?", "context": "Nothing is marked here."},
        "parameters": {"handle_impossible_answer": True},
    }

    answer = ask(javascript_packages, url, request)["answer"]

    assert (answer["answer"], answer["start"], answer["end"]) == ("", 0, 0)


def test_the_client_shows_our_sentence(javascript_packages: Path, url: str, engine: FakeEngine) -> None:
    inputs = {"question": "Where?", "context": CONTEXT}

    refused = ask(javascript_packages, url, {"inputs": inputs, "parameters": {"top_k": 1_000}})
    engine.failure = EngineUnavailable("the engine is not reachable at 127.0.0.1:1")
    down = ask(javascript_packages, url, {"inputs": inputs})

    assert refused["status"] in (400, 422)
    assert "top_k" in refused["error"]
    assert down["status"] == 503
    assert "the engine is not reachable at 127.0.0.1:1" in down["error"]
