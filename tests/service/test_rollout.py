"""Switch two versions of a real model in a real Triton behind two services, under load: no failures, no mix-ups."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from bertqa.cli.command import status
from bertqa.manifest import MODEL_NAME
from bertqa.repository import Repository
from service.commands import doctor, models
from service.runtime.triton_process import EmbeddedTriton
from service.triton import servers as triton_servers
from service.triton.channels import Channels
from tests.support.bundles import CONTEXT, break_engine, expect_another_answer, flip, publish
from tests.support.certificates import certificates, tls_flags
from tests.support.paths import ROOT
from tests.support.ports import free_port, triton_ports
from tests.support.triton_servers import triton_with
from tests.support.waiting import until

pytestmark = pytest.mark.triton


@dataclass
class Product:
    """Triton, two services over one repository, and what the clients got."""

    repository: Repository
    triton: EmbeddedTriton
    urls: list[str]
    replies: list[tuple[str, int, Any]] = field(default_factory=list)  # service, status, body

    def listed(self, url: str) -> list[dict[str, Any]]:
        """What a service says of its models."""
        found: list[dict[str, Any]] = httpx.get(f"{url}/v1/models", trust_env=False).json()["models"]
        return found

    def versions(self) -> list[int]:
        """Which version each service answers from."""
        return [self.listed(url)[0]["version"] for url in self.urls]

    def models(self, *words: str) -> int:
        """`bertqa models`, in this process."""
        flags = ["--repository", str(self.repository.root), "--triton-url", self.triton.url]
        return status(models.app, [*words[:1], *flags, *words[1:]])


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Product]:
    directory = tmp_path_factory.mktemp("rollout")
    repository = Repository(directory / "model_repository")
    for seed in (1, 2):
        publish(repository, directory, seed)
    with contextlib.ExitStack() as stack:
        triton = EmbeddedTriton(repository.root, ports=triton_ports(), log_dir=directory / "logs")
        stack.enter_context(triton)
        urls = [stack.enter_context(service(repository.root, triton.url)) for _ in range(2)]
        until(lambda: all(httpx.get(f"{url}/health/ready", trust_env=False).status_code == 200 for url in urls))
        yield Product(repository, triton, urls)


@contextlib.contextmanager
def service(repository: Path, triton_url: str) -> Iterator[str]:
    """A service in a process of its own."""
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "--factory", "service.app:create_app", f"--port={port}"]
    environment = {"BERTQA_REPOSITORY": str(repository), "BERTQA_TRITON_URL": triton_url}
    with subprocess.Popen(
        [*command, "--log-level=warning", "--loop=uvloop"], cwd=ROOT, env={**os.environ, **environment}
    ) as process:
        try:
            until(lambda: answers(f"http://127.0.0.1:{port}/health/live") or process.poll() is not None)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            assert process.wait(30) == -signal.SIGTERM  # uvicorn passes it on to itself when it has finished


def answers(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(url, trust_env=False).status_code == 200
    return False


@contextlib.contextmanager
def load(product: Product) -> Iterator[None]:
    """Four clients that ask without pause, two of each service; whatever comes back is kept."""
    done = threading.Event()

    def ask(url: str) -> None:
        with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
            while not done.is_set():
                reply = client.post("/v1/answer", json={"question": "Who wrote it?", "context": CONTEXT})
                product.replies.append((url, reply.status_code, reply.json()))

    clients = [threading.Thread(target=ask, args=(url,)) for url in product.urls * 2]
    for client in clients:
        client.start()
    try:
        yield
    finally:
        done.set()
        for client in clients:
            client.join()


def test_a_whole_rollout_under_load_fails_and_mixes_up_nothing(
    product: Product, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = {}
    for version in (1, 2):
        bundle = product.repository.open(version=version)
        path = product.repository.directory(MODEL_NAME, version) / "questions.json"
        (answer,) = (each["answer"] for each in json.loads(path.read_text()) if each["question"] == "Who wrote it?")
        expected[version] = (bundle.manifest.identity, answer)
    assert expected[1][1] != expected[2][1]

    product.replies.clear()
    with load(product):
        assert product.versions() == [1, 1]
        assert product.models("switch", MODEL_NAME, "2") == 1
        assert "version 2 is not loaded; run `bertqa models load bert_qa 2` first" in capsys.readouterr().err
        assert product.models("load", MODEL_NAME, "2") == 0
        assert "answers 2 questions as at build time" in capsys.readouterr().err
        assert product.models("check", MODEL_NAME, "2") == 0
        assert product.versions() == [1, 1]
        assert product.models("switch", MODEL_NAME, "2") == 0
        until(lambda: product.versions() == [2, 2], seconds=10)
        assert product.models("rollback", MODEL_NAME) == 0
        until(lambda: product.versions() == [1, 1], seconds=10)
        assert product.models("switch", MODEL_NAME, "2") == 0
        assert product.models("unload", MODEL_NAME, "2") == 1
        assert "version 2 is active; switch to another version first" in capsys.readouterr().err
        assert product.models("unload", MODEL_NAME, "1") == 0
        assert product.models("list") == 0
        listed = [line.split()[:4] for line in capsys.readouterr().out.splitlines()[1:]]
        assert listed == [[MODEL_NAME, "1", "previous", "unavailable"], [MODEL_NAME, "2", "active", "ready"]]
        assert product.models("rollback", MODEL_NAME) == 0  # loads it again
        until(lambda: product.versions() == [1, 1], seconds=10)

    assert {status for _, status, _ in product.replies} == {200}
    found = {version: set[tuple[str, str]]() for version in expected}
    for _, _, body in product.replies:
        found[body["version"]].add((body["model"], body["answers"][0]["text"]))
    assert found == {version: {pair} for version, pair in expected.items()}
    assert {(url, body["version"]) for url, _, body in product.replies} == {
        (url, version) for url in product.urls for version in (1, 2)
    }


def test_what_is_published_under_load_disturbs_nothing_and_a_new_model_answers_by_its_name(product: Product) -> None:
    root, models = product.repository.root, product.repository.serving
    product.replies.clear()
    with load(product):
        publish(product.repository, root.parent, 3)
        publish(product.repository, root.parent, 4, "other")
        until(lambda: all(len(product.listed(url)) == 2 for url in product.urls))
        seen = len(product.replies)
        until(lambda: len(product.replies) > seen + 8)
    assert {(status, body["version"]) for _, status, body in product.replies} == {(200, models()[MODEL_NAME].active)}
    expected = json.loads((product.repository.directory("other", 1) / "questions.json").read_text())
    for url in product.urls:
        for asked in expected:
            body = {"question": asked["question"], "context": asked["context"], "model": "other"}
            reply = httpx.post(f"{url}/v1/answer", json=body, trust_env=False).json()
            assert (reply["model"], reply["version"]) == (product.repository.open("other").manifest.identity, 1)
            assert (reply["answers"][0]["text"], reply["answers"][0]["start"]) == (asked["answer"], asked["start"])
    shutil.rmtree(root / "other")
    until(lambda: all(len(product.listed(url)) == 1 for url in product.urls))


def test_a_version_that_is_asked_is_not_unloaded(product: Product, capsys: pytest.CaptureFixture[str]) -> None:
    active = product.repository.serving()[MODEL_NAME].active
    other = 3 - active
    assert product.models("load", MODEL_NAME, str(other)) == 0
    done = threading.Event()

    def ask() -> None:
        async def scenario() -> None:
            channels = Channels([product.triton.url])
            engine = channels.engine(version=other)
            (window,) = product.repository.open(version=other).tokenizer("Who wrote it?", CONTEXT).windows
            while not done.is_set():
                await engine.predict([window], deadline=time.monotonic() + 10)
            await channels.close()

        asyncio.run(scenario())

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        assert product.models("unload", MODEL_NAME, str(other), "--timeout", "1") == 1
        assert f"{MODEL_NAME} {other} is still in use, with " in capsys.readouterr().err
    finally:
        done.set()
        asking.join()
    assert product.models("unload", MODEL_NAME, str(other)) == 0


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda directory: flip(directory / "engine.bin"),
            r"engine\.bin: has changed since it was published; build it again",
        ),
        (lambda directory: flip(directory / "tokenizer.json"), r"tokenizer\.json: not the tokenizer that the engine"),
        (break_engine, r"cannot load bert_qa \d+: Internal: RuntimeError: "),
        (expect_another_answer, r"at build time the answer was 'somebody else'"),
    ],
    ids=["engine", "tokenizer", "an engine that cannot be loaded", "an engine that answers otherwise"],
)
def test_a_spoiled_version_is_refused_and_the_old_one_serves_on(
    product: Product, spoil: Callable[[Path], None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = product.repository.root / MODEL_NAME
    active = product.repository.serving()[MODEL_NAME].active
    version = max(product.repository.versions(MODEL_NAME)) + 1
    shutil.copytree(model / "1", model.parent.parent / "spoiled")
    spoil(model.parent.parent / "spoiled")
    (model.parent.parent / "spoiled").rename(model / str(version))
    product.replies.clear()
    with load(product):
        assert product.models("load", MODEL_NAME, str(version)) == 1
        assert re.search(message, capsys.readouterr().err)
        assert product.models("check", MODEL_NAME, str(version)) == 1
        seen = len(product.replies)
        until(lambda: len(product.replies) > seen + 8)
    assert {(status, body["version"]) for _, status, body in product.replies} == {(200, active)}
    assert product.repository.serving()[MODEL_NAME].loaded == (active,)


def test_the_doctor_asks_a_running_triton(product: Product, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--repository", str(product.repository.root), "--port", "0"]
    port = product.triton.url.rpartition(":")[2]
    for words in (["--triton-url", product.triton.url], ["--triton-grpc-port", port]):
        assert status(doctor.app, [*flags, *words]) == 0
        active = product.repository.served(MODEL_NAME).active
        told = capsys.readouterr().out
        assert f"bert_qa {active} in Triton at {product.triton.url}: answers 2 questions as at build time" in told
    assert re.search(rf"ok +port {port}: Triton's gRPC is running", told)
    elsewhere = product.repository.root.parent / "copy"
    shutil.copytree(product.repository.root, elsewhere)
    Repository(elsewhere).activate(MODEL_NAME, 3 - active)  # which this Triton does not know of
    assert status(doctor.app, [*flags[2:], "--repository", str(elsewhere), "--triton-url", product.triton.url])
    assert re.search(
        rf"FAIL +bert_qa {3 - active} in Triton at .* is unavailable, unloaded; make it poll", capsys.readouterr().out
    )


def test_an_edited_configuration_is_written_again_as_the_doctor_says(
    product: Product, capsys: pytest.CaptureFixture[str]
) -> None:
    active = product.repository.served(MODEL_NAME).active
    path = product.repository.root / MODEL_NAME / "config.pbtxt"
    flags = ["--repository", str(product.repository.root), "--triton-url", product.triton.url, "--port", "0"]
    generated = path.read_text()
    path.write_text(generated.replace("KIND_CPU", "KIND_AUTO"))  # to which Triton goes over at once
    assert status(doctor.app, flags) == 1
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL"))
    fix = line.rpartition("`bertqa models ")[2].removesuffix("`").split()
    assert fix == ["load", MODEL_NAME, str(active)]
    assert product.models(*fix) == 0
    assert path.read_text() == generated
    assert status(doctor.app, flags) == 0


@pytest.mark.parametrize("mutual", [False, True], ids=["tls", "mutual"])
def test_models_and_doctor_speak_tls(
    product: Product,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    mutual: bool,
) -> None:
    """To the addresses of a name, which are not in the certificate."""
    files = certificates(tmp_path)
    lookup = socket.getaddrinfo
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *rest, **options: lookup(host.replace("triton.test", "127.0.0.1"), *rest, **options),
    )
    active = product.repository.served(MODEL_NAME).active

    def told(**settings: str) -> tuple[int, int, str]:
        with monkeypatch.context() as patch:
            for name, file in settings.items():
                patch.setenv(f"BERTQA_TRITON_TLS_{name.upper()}", str(files / file))
            checked = status(models.app, ["check", *flags, MODEL_NAME, str(active)])
            looked = status(doctor.app, [*flags, "--port", "0"])
        return checked, looked, "".join(capsys.readouterr())

    with triton_with(tmp_path, product.repository.root, *tls_flags(files, mutual=mutual)) as url:
        port = url.rpartition(":")[2]
        flags = ["--repository", str(product.repository.root), "--triton-url", f"triton.test:{port}"]
        own = {"cert": "client.pem", "key": "client.key"} if mutual else {}
        checked, looked, said = told(ca="ca.pem", **own)
        assert (checked, looked) == (0, 0), said
        assert said.count(f"{MODEL_NAME} {active} at 127.0.0.1:{port} answers 2 questions as at build time") == 1
        assert f"{MODEL_NAME} {active} in Triton at 127.0.0.1:{port}: answers 2 questions" in said
        strangers = [
            ({}, "does not answer: "),
            ({"ca": "other.pem"}, "over TLS"),
            ({"ca": "none.pem"}, "TLS_CA: .* cannot be read"),
        ]
        if mutual:
            strangers.append(({"ca": "ca.pem"}, "over TLS"))
            strangers.append(({"ca": "ca.pem", "cert": "stranger.pem", "key": "stranger.key"}, "over TLS"))
        for settings, reason in strangers:
            checked, looked, said = told(**settings)
            assert (checked, looked) == (1, 1), said
            assert len(re.findall(reason, said)) == 2, said
        monkeypatch.setattr(
            triton_servers, "_host", lambda url: "localhost.test"
        )  # a name that is not in the certificate
        assert told(ca="ca.pem", **own)[:2] == (1, 1)


def test_the_command_line_names_what_is_missing(product: Product, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "bertqa.cli", "models", "list", "--repository", str(product.repository.root)]
    listed = subprocess.run(
        [*command, "--triton-url", "127.0.0.1:1"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert listed.returncode == 0  # the versions are there, whatever Triton says
    assert listed.stdout.splitlines()[0].split() == ["MODEL", "VERSION", "SERVED", "TRITON", "F1", "BUILT", "IDENTITY"]
    assert "Triton at 127.0.0.1:1 does not answer" in listed.stderr
    for words, message in (
        (("load", MODEL_NAME, "1", "--triton-url", "127.0.0.1:1"), "give its address with --triton-url"),
        (("load", "german", "1"), "german: no such model in"),
        (("check", MODEL_NAME, "99"), f"{MODEL_NAME}: no version 99; the versions are 1, 2"),
        (
            ("check", MODEL_NAME, "1", "--triton-url", "no-such-host.invalid:8001"),
            "--triton-url no-such-host.invalid:80",
        ),
    ):
        assert product.models(*words) == 1
        assert message in capsys.readouterr().err
