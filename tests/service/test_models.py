"""Test several models and versions in one service: chosen by name, and switched between versions."""

import asyncio
import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpx
import pytest

from bertqa.manifest import MODEL_NAME, Bundle, BundleMismatch, Manifest
from bertqa.repository import Repository
from bertqa.spans import Logits
from bertqa.windows import Window
from service.app import create_app
from service.inference import watcher
from service.settings import Settings
from service.triton.admin import Loaded
from service.triton.errors import EngineUnavailable
from tests.support.repositories import publish_toy_bundle
from tests.support.servers import serving
from tests.support.toy_model import FakeEngine
from tests.support.waiting import until

Publish = Callable[..., str]
Start = Callable[..., httpx.Client]
ASKED = {"question": "Who made it?", "context": "It was made at «Uber»."}


class FakeTriton(FakeEngine):
    """Serves the toy model under every name and version that it has loaded."""

    def __init__(self) -> None:
        super().__init__("")
        self.versions: dict[tuple[str, int], str] = {}  # identities
        self.hold = False  # lets the first version wait with its answers
        self.held, self.go_on = threading.Event(), threading.Event()

    def engine(self, model: str, version: int) -> FakeEngine:
        return FakeVersion(self, model, version)

    admin = engine


class FakeVersion(FakeEngine):
    def __init__(self, triton: FakeTriton, model: str, version: int) -> None:
        super().__init__("")
        self.triton, self.key = triton, (model, version)

    async def check_ready(self, *, deadline: float) -> None:
        self.failure = None if self.key in self.triton.versions else EngineUnavailable(f"{self.key} is not loaded")
        await super().check_ready(deadline=deadline)

    async def predict(self, windows: Sequence[Window], *, deadline: float) -> list[Logits]:
        if self.triton.hold and self.key[1] == 1:
            self.triton.held.set()
            await asyncio.to_thread(self.triton.go_on.wait)
        return await super().predict(windows, deadline=deadline)

    async def loaded(self, *, deadline: float) -> Loaded:
        await self.check_ready(deadline=deadline)
        identities = {
            f"identity_{version}": identity
            for (model, version), identity in self.triton.versions.items()
            if model == self.key[0]
        }
        return Loaded(identities, self.concurrency)


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path)


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> FakeTriton:
    monkeypatch.setattr(watcher, "LOOK_S", 0.02)
    return FakeTriton()


@pytest.fixture
def publish(bundle: Bundle, repository: Repository, triton: FakeTriton) -> Callable[..., str]:
    """Puts a version of the toy model into the repository, and into the toy server; gives its identity."""

    def publish(version: int, model: str = MODEL_NAME, *, loaded: bool = True) -> str:
        directory = publish_toy_bundle(repository, bundle, version, model, name=f"{model}{version}")
        identity = Manifest.read(directory / "manifest.json").identity
        if loaded:
            triton.versions[model, version] = identity
        return identity

    return publish


@pytest.fixture
def start(repository: Repository, triton: FakeTriton) -> Iterator[Callable[..., httpx.Client]]:
    """Starts the service over the repository; keyword arguments are settings."""
    with contextlib.ExitStack() as stack:

        def start(**settings: str) -> httpx.Client:
            app = create_app(Settings(repository=repository.root, **settings), engine=triton)  # type: ignore[arg-type]
            url = stack.enter_context(serving(app))
            return stack.enter_context(httpx.Client(base_url=url, timeout=30, trust_env=False))

        yield start


def versions(client: httpx.Client) -> dict[str, int]:
    return {each["name"]: each["version"] for each in client.get("/v1/models").json()["models"]}


def test_models_are_chosen_by_name(start: Start, publish: Publish) -> None:
    identities = {name: publish(3, name) for name in (MODEL_NAME, "korean")}
    client = start()
    found = client.get("/v1/models").json()
    assert found["default"] == MODEL_NAME
    assert [(each["name"], each["version"], each["identity"]) for each in found["models"]] == [
        (MODEL_NAME, 3, identities[MODEL_NAME]),
        ("korean", 3, identities["korean"]),
    ]
    assert found["models"][1]["checkpoint"] == "korean3"
    assert found["models"][1]["f1"] == 100
    for name, expected in ((None, MODEL_NAME), (MODEL_NAME, MODEL_NAME), ("korean", "korean")):
        reply = client.post("/v1/answer", json={**ASKED, "model": name}).json()
        assert (reply["model"], reply["version"]) == (identities[expected], 3)
    questions = [{**ASKED, "model": name} for name in ("korean", MODEL_NAME, None)]
    results = client.post("/v1/answers", json={"questions": questions}).json()["results"]
    assert [each["model"] for each in results] == [identities[each] for each in ("korean", MODEL_NAME, MODEL_NAME)]
    metrics = client.get("/metrics").text
    assert f'bertqa_model_info{{identity="{identities["korean"]}",model="korean",version="3"}} 1.0' in metrics
    assert 'bertqa_questions_total{model="korean",version="3"} 2.0' in metrics
    assert client.get("/health/ready", params={"model": "korean"}).json() == {"status": "ready"}


def test_a_model_that_is_not_there_is_refused_by_name(start: Start, publish: Publish) -> None:
    publish(1)
    publish(1, "korean")
    client = start(model="korean")
    assert client.get("/info").json()["manifest"]["name"] == "korean1"
    for path, body, field in (
        ("/v1/answer", {**ASKED, "model": "x" * 500}, "model"),
        ("/v1/answers", {"questions": [ASKED, {**ASKED, "model": "german"}]}, "questions[1].model"),
    ):
        refused = client.post(path, json=body)
        assert (refused.status_code, refused.json()["field"]) == (422, field)
        assert f"{field}: must be one of bert_qa, korean; got '" in refused.json()["error"]
        assert len(refused.json()["error"]) < 250
    assert client.get("/health/ready", params={"model": "german"}).json()["field"] == "model"


def test_an_address_of_hugging_face_names_a_model_once_there_are_several(start: Start, publish: Publish) -> None:
    publish(1)
    inputs = {"inputs": ASKED}
    assert start().post("/models/deepset/roberta-base-squad2", json=inputs).json()["answer"] == "Uber"
    publish(1, "Korean")
    client = start()
    for path in ("/", "/models/Korean", "/models/Korean/pipeline/question-answering"):
        assert client.post(path, json=inputs).json()["answer"] == "Uber"
    assert 'bertqa_questions_total{model="Korean",version="1"} 2.0' in client.get("/metrics").text
    refused = client.post("/models/deepset/roberta-base-squad2", json=inputs)
    assert (refused.status_code, refused.json()["error_type"]) == (404, "not_found")
    assert refused.json()["error"] == "deepset/roberta-base-squad2: no such model; the models are Korean, bert_qa"


@pytest.mark.parametrize(
    ("models", "default", "message"),
    [
        (["korean"], "german", "BERTQA_MODEL: must be one of korean; got 'german'"),
        (["english", "korean"], "", "BERTQA_MODEL: set it to the default model, one of english, korean"),
    ],
)
def test_a_default_that_is_not_clear_is_refused(
    repository: Repository, triton: FakeTriton, publish: Publish, models: list[str], default: str, message: str
) -> None:
    for model in models:
        publish(1, model)
    app = create_app(Settings(repository=repository.root, model=default), engine=triton)

    async def run() -> None:
        async with app.router.lifespan_context(app):
            pass

    with pytest.raises(BundleMismatch, match=message):
        asyncio.run(run())


def test_the_service_follows_under_load_and_every_reply_is_of_one_version(
    start: Start, publish: Publish, repository: Repository, triton: FakeTriton
) -> None:
    identities = {1: publish(1), 2: publish(2, loaded=False)}
    repository.activate(MODEL_NAME, 1, alone=True)
    client = start()
    done, replies = threading.Event(), []

    def ask() -> None:
        while not done.is_set():
            replies.append(client.post("/v1/answer", json=ASKED))

    clients = [threading.Thread(target=ask) for _ in range(4)]
    for each in clients:
        each.start()
    repository.activate(MODEL_NAME, 2)  # before Triton has it
    time.sleep(0.3)
    assert versions(client) == {MODEL_NAME: 1}
    triton.versions[MODEL_NAME, 2] = "something else"
    time.sleep(0.3)
    assert versions(client) == {MODEL_NAME: 1}
    triton.versions[MODEL_NAME, 2] = identities[2]
    until(lambda: versions(client) == {MODEL_NAME: 2})
    before = len(replies)
    until(lambda: len(replies) > before + 20)
    repository.switch(MODEL_NAME, 1)
    until(lambda: versions(client) == {MODEL_NAME: 1})
    done.set()
    for each in clients:
        each.join()
    assert {reply.status_code for reply in replies} == {200}
    found = {(body["version"], body["model"]) for body in (reply.json() for reply in replies)}
    assert found == {(1, identities[1]), (2, identities[2])}


def test_a_question_in_progress_ends_with_the_version_that_it_began_with(
    start: Start, publish: Publish, repository: Repository, triton: FakeTriton
) -> None:
    publish(1)
    publish(2)
    repository.activate(MODEL_NAME, 1, alone=True)
    client = start()
    triton.hold = True
    slow: list[int] = []
    asking = threading.Thread(target=lambda: slow.append(client.post("/v1/answer", json=ASKED).json()["version"]))
    asking.start()
    assert triton.held.wait(20)
    repository.activate(MODEL_NAME, 2)
    until(lambda: versions(client) == {MODEL_NAME: 2})
    assert client.post("/v1/answer", json=ASKED).json()["version"] == 2
    assert slow == []
    triton.go_on.set()
    asking.join()
    assert slow == [1]


@pytest.mark.parametrize("part", ["tokenizer.json", "manifest.json"])
def test_a_spoiled_version_never_answers(
    start: Start, publish: Publish, repository: Repository, part: str, caplog: pytest.LogCaptureFixture
) -> None:
    publish(1)
    repository.activate(MODEL_NAME, 1)
    publish(2)
    path = repository.directory(MODEL_NAME, 2) / part
    spoiled = bytearray(path.read_bytes())
    spoiled[len(spoiled) // 2] ^= 1
    client = start()
    repository.load(MODEL_NAME, 2)
    path.write_bytes(spoiled)
    stated = (repository.root / "serving.json").read_text().replace('"active": 1', '"active": 2')
    (repository.root / "serving.json").write_text(stated)
    until(lambda: "version 2 of bert_qa cannot answer yet" in caplog.text)
    assert client.post("/v1/answer", json=ASKED).json()["version"] == 1
    assert caplog.text.count("version 2 of bert_qa cannot answer yet") == 1


def test_models_come_and_go_and_a_broken_serving_json_changes_nothing(
    start: Start, publish: Publish, repository: Repository, caplog: pytest.LogCaptureFixture
) -> None:
    publish(1)
    repository.activate(MODEL_NAME, 1)
    client = start()
    publish(1, "korean")
    repository.activate("korean", 1)
    until(lambda: versions(client) == {MODEL_NAME: 1, "korean": 1})
    text = (repository.root / "serving.json").read_text()
    (repository.root / "serving.json").write_text("{")
    until(lambda: "serving.json: not readable" in caplog.text)
    assert versions(client) == {MODEL_NAME: 1, "korean": 1}
    (repository.root / "serving.json").write_text(text)
    shutil.rmtree(repository.root / "korean")
    until(lambda: versions(client) == {MODEL_NAME: 1})
    assert 'model_info{identity="korean' not in client.get("/metrics").text
