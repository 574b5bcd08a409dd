"""The application: how its parts start, and what they check then."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from bertqa.manifest import Bundle, BundleMismatch
from service.app import create_app
from service.inference import readiness
from service.settings import Settings
from service.triton.errors import EngineUnavailable
from tests.support.asking import ASKED, problem
from tests.support.servers import serving
from tests.support.toy_model import FakeEngine

MakeApp = Callable[..., FastAPI]


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
    engine.failure = EngineUnavailable("not up yet")
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
        assert any("calls pause for a moment" in line for line in said)  # the others are trials
        text = client.get("/metrics").text
    for replica in ("127.0.0.1:1", "127.0.0.1:2"):
        labels = f'model="bert_qa",replica="{replica}"'
        assert f'bertqa_circuit_state{{{labels},version="7"}} 2.0' in text
        assert f'bertqa_circuit_transitions_total{{{labels},to="open",version="7"}} ' in text


def test_a_repository_without_a_version_is_refused(tmp_path: Path, engine: FakeEngine) -> None:
    with pytest.raises(BundleMismatch, match="holds no built version"):
        start_and_stop(create_app(Settings(repository=tmp_path), engine=engine))


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
