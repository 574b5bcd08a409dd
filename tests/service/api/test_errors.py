"""Every error has one shape, its own status and its own type."""

import httpx
import pytest

from bertqa.spans import InvalidLogits
from service.inference import readiness
from service.triton.errors import EngineBroken, EngineOverloaded, EngineTimeout, EngineUnavailable
from tests.support.asking import ASKED, problem
from tests.support.toy_model import FakeEngine


def test_routes_and_methods_that_are_not_there(shared_client: httpx.Client) -> None:
    problem(shared_client.get("/nowhere"), 404, "not_found")
    problem(shared_client.get("/static/../app.py"), 404, "not_found")
    problem(shared_client.post("/v1/answer/", json=ASKED), 404, "not_found")
    response = shared_client.get("/v1/answer")
    problem(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("failure", "status", "error_type"),
    [
        (EngineUnavailable("no connection"), 503, "engine_unavailable"),
        (EngineOverloaded("the queue is full"), 503, "engine_overloaded"),
        (EngineBroken("output of another shape"), 503, "engine_broken"),
        (InvalidLogits("start_logits: NaN"), 503, "engine_broken"),
        (EngineTimeout("no answer in time"), 504, "engine_timeout"),
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
