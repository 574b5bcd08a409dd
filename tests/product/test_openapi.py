"""Test the errors in OpenAPI: each operation is made to return all of its documented errors, and no others."""

import json
import socket
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from select import select
from urllib.parse import urlsplit

import httpx
import pytest

from bertqa.manifest import MODEL_NAME
from service.api_keys import new_key
from service.app import create_app
from service.inference import probe, readiness
from service.inference.registry import ModelRegistry, ServedModel
from service.observability.metrics import Metrics
from service.runtime.http_protocol import MAX_HEAD_BYTES, BoundedProtocol
from service.runtime.request_bodies import SMALL_BODY_BYTES
from service.settings import Settings
from service.triton.errors import EngineBroken, EngineOverloaded, EngineTimeout, EngineUnavailable
from tests.support.asking import ASKED
from tests.support.servers import serving
from tests.support.toy_model import FakeEngine, toy_bundle
from tests.support.waiting import until

BODIES = {
    "/v1/answer": ASKED,
    "/v1/answers": {"questions": [ASKED]},
    "/": {"inputs": ASKED},
    "/models/{model_id}": {"inputs": ASKED},
}
MAX_BODY, MAX_CONNECTIONS = 100_000, 16
Given = dict[tuple[str, str], dict[str, set[str]]]
"""By method and path, then by status: the error types that came, or that OpenAPI names."""


class Operations:
    """A service, and what its operations have given so far."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.given: Given = defaultdict(lambda: defaultdict(set))
        with httpx.Client(base_url=url, trust_env=False) as client:
            self.document = client.get("/openapi.json").json()

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for path, operations in self.document["paths"].items():
            for method in operations:
                yield method.upper(), path

    def documented(self) -> Given:
        said: Given = {}
        for method, path in self:
            said[method, path] = {
                status: set(response["content"]["application/json"]["schema"]["properties"]["error_type"]["enum"])
                for status, response in self.document["paths"][path][method.lower()]["responses"].items()
                if status != "200"
            }
        return said

    def note(self, operation: tuple[str, str], reply: httpx.Response) -> None:
        if reply.status_code != 200:
            self.given[operation][str(reply.status_code)].add(reply.json()["error_type"])
            declared = self.document["paths"][operation[1]][operation[0].lower()]["responses"][str(reply.status_code)]
            for name in declared["headers"].keys() - {"x-request-id"}:
                assert name in reply.headers

    def ask(self, key: str | None, *, model: str = MODEL_NAME, **changes: object) -> None:
        """Send every operation its right request, but for the changes."""
        headers = {"authorization": f"Bearer {key}"} if key else {}
        with httpx.Client(base_url=self.url, trust_env=False, headers=headers, timeout=30) as client:
            for method, path in self:
                options = ({"json": BODIES[path]} if method == "POST" else {}) | changes
                options["headers"] = {"connection": "close", **options.get("headers", {})}  # type: ignore[dict-item]
                self.note((method, path), client.request(method, path.format(model_id=model), **options))  # type: ignore[arg-type]

    def send(self, unfinished: str = "") -> None:
        """Write to every operation an incomplete request, with its method and path put in."""
        with ExitStack() as stack:
            connections = [(each, stack.enter_context(self.connection())) for each in self]
            for (method, path), connection in connections:
                connection.sendall(unfinished.format(method=method, path=path).encode())
            for operation, connection in connections:
                self.note(operation, _read(connection))

    def crowd(self, key: str | None) -> None:
        """Send every operation that takes a body two that do not end, of which one alone has room."""
        size = MAX_BODY - SMALL_BODY_BYTES
        for method, path in self:
            if method != "POST":
                continue
            head = f"POST {path.format(model_id=MODEL_NAME)} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            head += f"content-length: {MAX_BODY}\r\nauthorization: Bearer {key}\r\n\r\n"
            with self.connection() as first, self.connection() as second:
                for connection in (first, second):
                    connection.sendall(head.encode() + b" " * size)
                (refused,), _, _ = select([first, second], [], [], 30)
                self.note((method, path), _read(refused))

    @contextmanager
    def connection(self) -> Iterator[socket.socket]:
        address = urlsplit(self.url)
        assert address.hostname
        assert address.port
        with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
            yield connection


def _read(connection: socket.socket) -> httpx.Response:
    received = b""
    while data := connection.recv(65536):
        received += data
    head, _, body = received.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines[1:])
    return httpx.Response(int(lines[0].split()[1]), headers=headers, content=body)


@pytest.mark.parametrize("guarded", [False, True])
def test_every_operation_gives_the_errors_that_are_described_and_no_other(
    tmp_path: Path, guarded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "service.runtime.http_protocol.MAX_BODIES_BYTES", 0
    )  # then one body of the largest size has room
    monkeypatch.setattr(readiness, "REUSE_S", 0.0)  # each probe finds out anew
    monkeypatch.setattr(probe, "EVIDENCE_S", 0.0)
    bundle = toy_bundle()
    engine = FakeEngine(bundle.manifest.identity)
    settings: dict[str, object] = {"arrival_s": 2.0, "max_connections": MAX_CONNECTIONS, "max_body_bytes": MAX_BODY}
    key = limited = None
    if guarded:
        settings["api_keys_file"] = str(tmp_path / "keys")
        key = new_key(tmp_path / "keys", "free", None, None)
        limited = new_key(tmp_path / "keys", "limited", 0.001, 1)
    app = create_app(Settings(**settings), engine=engine, bundle=bundle)  # type: ignore[arg-type]
    with serving(app, http=BoundedProtocol) as url:
        pipeline = app.state.services.pipeline
        other = ServedModel(bundle, engine, Metrics(), Settings())
        pipeline.registry = ModelRegistry(bundle.model, {bundle.model: pipeline.registry[None], "other": other})
        operations = Operations(url)
        operations.ask(key)
        assert not operations.given
        # what is wrong with a request
        operations.ask(None)
        operations.ask(limited)
        operations.ask(limited)
        operations.ask(key, model="none")
        operations.ask(key, params={"model": "none", "top_k": 0})
        operations.ask(key, headers={"content-type": "text/plain"})
        for body in (b"{", b"[]", b'"%s"' % (b"x" * MAX_BODY)):
            operations.ask(key, headers={"content-type": "application/json"}, json=None, content=body)
        operations.send("{method} {path} HTTP/1.1\r\nno colon\r\n\r\n")
        operations.send("{method} {path} HTTP/1.1\r\nx: " + "x" * MAX_HEAD_BYTES + "\r\n\r\n")
        operations.send("{method} {path} HTTP/1.1\r\nhost: x\r\n")  # and nothing more
        operations.crowd(key)
        # what may be wrong with the engine, the bundle and the process
        for failure in (EngineOverloaded, EngineBroken, EngineTimeout, EngineUnavailable):
            engine.failure = failure("as asked")
            operations.ask(key)
        engine.failure, engine.identity = None, "another"  # which is looked at after the engine was away
        operations.ask(key)
        app.state.services.shutdown.has_begun = True
        operations.ask(key)
        app.state.services.shutdown.has_begun, engine.identity, engine.delay_s = False, bundle.manifest.identity, 60.0
        with ExitStack() as stack:
            for _ in range(MAX_CONNECTIONS):  # none is idle
                stack.enter_context(operations.connection()).sendall(_request(key))
            until(
                lambda: pipeline.registry[None].admission.busy == MAX_CONNECTIONS,
                "not all questions are being answered",
            )
            operations.send()
    assert operations.given == operations.documented()
    if guarded:
        with_key = {operation for operation in operations if "401" in operations.given[operation]}
        said = {(m, p) for m, p in operations if operations.document["paths"][p][m.lower()].get("security")}
        assert with_key == said


def _request(key: str | None) -> bytes:
    body = json.dumps(ASKED).encode()
    head = f"POST /v1/answer HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return f"{head}authorization: Bearer {key}\r\n\r\n".encode() + body
