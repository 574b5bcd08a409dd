"""What operators and browsers ask."""

import re

import httpx

from bertqa.manifest import Bundle
from service.triton.errors import EngineUnavailable
from tests.support.asking import ask
from tests.support.toy_model import FakeEngine


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
    engine.failure = EngineUnavailable("gone")
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
