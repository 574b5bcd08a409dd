"""Who may ask, over real HTTP: API keys and their rates."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from fastapi import FastAPI
from huggingface_hub import InferenceClient

from service.api_keys import PREFIX, Keyring, Unit, new_key, parse_keys
from service.settings import Settings
from tests.support.asking import ASKED, problem
from tests.support.key_clients import connect
from tests.support.servers import serving

MakeApp = Callable[..., FastAPI]


def test_only_a_known_key_is_answered_and_health_is_open(guarded: str, key: str) -> None:
    with connect(guarded) as client:
        strange: list[dict[str, str | bytes]] = [
            {},
            {"authorization": "Bearer"},
            {"authorization": f"Bearer {PREFIX}{'A' * 43}"},
            {"authorization": f"Bearer {key[:-1]}"},
            {"authorization": f"Bearer {key} {key}"},
            {"authorization": f"Basic {key}"},
            {"x-api-key": key.upper()},
            {"x-api-key": "ключ".encode()},
            {"x-api-key": "x" * 10_000},
        ]
        for headers in strange:
            for method, path in (("POST", "/v1/answer"), ("POST", "/"), ("GET", "/info"), ("GET", "/no/such/path")):
                response = client.request(method, path, headers=headers)  # type: ignore[arg-type]  # bytes too
                said = problem(response, 401, "unauthorized")
                assert response.headers["www-authenticate"] == 'Bearer realm="bertqa"'
                assert key[8:20] not in said
        for known in ({"authorization": f"Bearer {key}"}, {"authorization": f"bearer  {key}"}, {"x-api-key": key}):
            assert client.post("/v1/answer", json=ASKED, headers=known).status_code == 200
            assert client.get("/info", headers=known).status_code == 200
        for path in ("/", "/health/live", "/health/ready", "/static/page.js", "/metrics", "/docs", "/openapi.json"):
            assert client.get(path).status_code == 200, path
        paths = client.get("/openapi.json").json()["paths"]
        assert paths["/info"]["get"]["security"] == paths["/"]["post"]["security"] == [{"api_key": []}]
        assert "security" not in paths["/"]["get"]
        problem(client.post("/health/live"), 401, "unauthorized")
        text = client.get("/metrics").text
    assert 'bertqa_key_requests_total{key="team-a",outcome="accepted"} 6.0' in text
    assert 'bertqa_errors_total{error_type="unauthorized"} 37.0' in text
    assert key[8:20] not in text


def test_the_hugging_face_client_sends_the_key_as_its_token(guarded: str, key: str) -> None:
    answered = InferenceClient(guarded, token=key).question_answering(
        question=ASKED["question"], context=ASKED["context"]
    )
    assert (answered[0] if isinstance(answered, list) else answered)["answer"] == "Uber"


def test_without_a_file_a_token_is_ignored(make_app: MakeApp) -> None:
    # The Hugging Face client sends one that is saved on the machine, whether asked to or not.
    with serving(make_app()) as url, connect(url, "hf_saved_long_ago") as client:
        assert client.post("/v1/answer", json=ASKED).status_code == 200
        assert "security" not in client.get("/openapi.json").text


def test_no_key_is_logged(
    guarded: str, key: str, keys_file: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    wrong = PREFIX + "w" * 43
    with caplog.at_level(logging.DEBUG), connect(guarded, key) as client, connect(guarded, wrong) as stranger:
        assert client.post("/v1/answer", json=ASKED).status_code == 200
        stranger.post("/v1/answer", json=ASKED)
        stranger.get("/health/ready")
        keyring = Keyring(keys_file)
        for line in (key, f"a {key} - -", f"a {'0' * 64} {key} 1", f"{key}/ {'0' * 64} - -"):  # put in the wrong place
            keys_file.write_text(line)
            keyring.reload()
    assert caplog.text.count("the previous keys stay valid") >= 4
    logged = caplog.text + "".join(capfd.readouterr())
    assert key[8:20] not in logged
    assert wrong[8:20] not in logged


def test_each_key_has_its_own_rate(make_app: MakeApp, keys_file: Path) -> None:
    slow, fast = new_key(keys_file, "slow", 0.01, 3), new_key(keys_file, "fast", None, None)
    with serving(make_app(api_keys_file=str(keys_file))) as url, connect(url, slow) as one, connect(url, fast) as other:
        assert [one.get("/info").status_code for _ in range(5)] == [200] * 3 + [429] * 2
        response = one.post("/v1/answer", json=ASKED)
        assert "slow may use 0.01 requests per second" in problem(response, 429, "rate_limited")
        assert 90 <= int(response.headers["retry-after"]) <= 100
        assert other.post("/v1/answer", json=ASKED).status_code == 200
        assert 'bertqa_key_requests_total{key="slow",outcome="limited"} 3.0' in other.get("/metrics").text


def test_a_rate_may_count_questions_or_windows(make_app: MakeApp, keys_file: Path) -> None:
    keys = {unit: new_key(keys_file, unit, 0.01, 8, unit) for unit in get_args(Unit)}
    assert [line.split()[4:] for line in keys_file.read_text().splitlines()] == [[], ["question"], ["window"]]
    assert {name: key.unit for name, key in parse_keys(keys_file).items()} == {unit: unit for unit in keys}
    short = {"questions": [ASKED] * 3}
    long = {**ASKED, "context": "word " * 150}
    with serving(make_app(api_keys_file=str(keys_file))) as url:

        def ask(unit: str, path: str, body: dict[str, Any], times: int) -> list[int]:
            with connect(url, keys[unit]) as client:
                replies = [client.post(path, json=body) for _ in range(times)]
            assert all(f"0.01 {unit}s per second" in reply.text for reply in replies if reply.status_code == 429)
            return [reply.status_code for reply in replies]

        assert ask("request", "/v1/answers", short, 9) == [200] * 8 + [429]
        assert ask("question", "/v1/answers", short, 4) == [200] * 3 + [429], "9 of 8, the last one a debt"
        with connect(url) as open_to_all:
            windows = open_to_all.post("/v1/answer", json=long, headers={"x-api-key": keys["window"]}).json()["windows"]
        assert windows > 8, "which leaves a debt"
        assert ask("window", "/v1/answer", long, 1) == [429]


def test_metrics_and_documentation_open_by_key_or_not_at_all(make_app: MakeApp, keys_file: Path, key: str) -> None:
    paths = ("/metrics", "/openapi.json", "/docs", "/static/swagger/swagger-ui.css")
    file = str(keys_file)
    for settings, without, with_key in (
        ({}, [200, 200, 200, 200], [200, 200, 200, 200]),
        ({"metrics": "off", "docs": "off"}, [404] * 4, [404] * 4),
        ({"api_keys_file": file, "metrics": "key", "docs": "key"}, [401, 401, 200, 200], [200] * 4),
        ({"api_keys_file": file, "metrics": "off", "docs": "off"}, [401, 401, 404, 404], [404] * 4),
    ):
        with serving(make_app(**settings)) as url, connect(url) as stranger, connect(url, key) as client:
            assert [stranger.get(path).status_code for path in paths] == without
            assert [client.get(path).status_code for path in paths] == with_key


@pytest.mark.parametrize(
    "settings",
    [{"metrics": "closed"}, {"docs": "key"}, {"cors_origins": "*"}, {"cors_origins": "https://a.example/"}],
)
def test_settings_that_cannot_be_are_named(settings: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=f"BERTQA_{next(iter(settings)).upper()}: "):
        Settings(**settings)  # type: ignore[arg-type]
