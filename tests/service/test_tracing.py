"""Test traces of the real application and gRPC client, with a server that speaks Triton's protocol and a collector that
speaks OpenTelemetry's."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from tritonclient.grpc import service_pb2_grpc

from bertqa.manifest import Bundle
from service.app import create_app
from service.settings import Settings
from tests.support.paths import ROOT
from tests.support.servers import serving
from tests.support.triton_servers import Triton, listening

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER = "00f067aa0ba902b7"
SECRET = "Kanarienvogel"  # pragma: allowlist secret
ASKED = {"question": f"Who is {SECRET}?", "context": f"It was made at {SECRET}. " * 40}


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.service = ""

    def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_spans:
            self.service = attributes(resource.resource)["service.name"]
            for scope in resource.scope_spans:
                self.spans += scope.spans
        return trace_service_pb2.ExportTraceServiceResponse()


def attributes(holder: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in holder.attributes}


@pytest.fixture
def triton(bundle: Bundle) -> Iterator[tuple[Triton, str]]:
    servicer = Triton(bundle.manifest.identity)
    with listening(service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server, servicer) as address:
        yield servicer, address


def traced(bundle: Bundle, triton: str, collector: str, calls: Callable[[httpx.Client], None]) -> None:
    """Make calls of an application that traces; returns when it has ended."""
    app = create_app(Settings(triton_url=triton, otlp_endpoint=f"http://{collector}"), bundle=bundle)
    with serving(app) as url, httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
        calls(client)


def test_one_trace_from_the_client_to_triton(bundle: Bundle, triton: tuple[Triton, str]) -> None:
    collector = Collector()

    def ask(client: httpx.Client) -> None:
        client.get("/health/ready")
        client.get("/metrics")
        headers = {"traceparent": f"00-{TRACE}-{CALLER}-01", "x-request-id": "mine"}
        assert client.post("/v1/answer", json=ASKED, headers=headers).status_code == 200

    with listening(trace_service_pb2_grpc.add_TraceServiceServicer_to_server, collector) as address:
        traced(bundle, triton[1], address, ask)
    assert collector.service == "bertqa"
    spans = {span.name: span for span in collector.spans}
    assert len(spans) == len(collector.spans)
    assert spans.keys() == {"POST /v1/answer", "tokenize", "infer", "decode"}
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE}
    root = spans["POST /v1/answer"]
    assert (root.parent_span_id.hex(), root.kind) == (CALLER, Span.SPAN_KIND_SERVER)
    parts = [spans[name] for name in ("tokenize", "infer", "decode")]
    assert all(part.parent_span_id == root.span_id for part in parts)
    times = [time for part in parts for time in (part.start_time_unix_nano, part.end_time_unix_nano)]
    assert times == sorted(times)
    assert root.start_time_unix_nano <= times[0]
    assert times[-1] <= root.end_time_unix_nano
    found = attributes(root)
    windows = found["bertqa.windows"]
    assert found.items() >= {
        ("http.request.method", "POST"),
        ("http.route", "/v1/answer"),
        ("http.response.status_code", 200),
        ("bertqa.request_id", "mine"),
        ("bertqa.model", bundle.manifest.identity),
    }
    assert windows > 8
    assert attributes(spans["infer"])["bertqa.windows"] == windows
    assert spans["infer"].kind == Span.SPAN_KIND_CLIENT
    sent = [parent for parent in triton[0].parents if parent]
    assert sent == [f"00-{TRACE}-{spans['infer'].span_id.hex()}-01"] * windows, "the probe's has none"
    assert SECRET not in str(collector.spans)


def test_an_error_is_in_the_trace_with_its_type_and_without_texts(bundle: Bundle, triton: tuple[Triton, str]) -> None:
    collector = Collector()
    statuses = []

    def go_wrong(client: httpx.Client) -> None:
        statuses.append(client.post("/v1/answer", json=ASKED | {SECRET: 1}).status_code)
        triton[0].broken = True
        statuses.append(client.post("/v1/answer", json=ASKED).status_code)
        statuses.append(client.get(f"/{SECRET}?{SECRET}").status_code)

    with listening(trace_service_pb2_grpc.add_TraceServiceServicer_to_server, collector) as address:
        traced(bundle, triton[1], address, go_wrong)
    assert statuses == [422, 503, 404]
    refused, failed, unknown = (span for span in collector.spans if span.kind == Span.SPAN_KIND_SERVER)
    assert attributes(refused)["error.type"] == "validation"
    assert refused.status.code == refused.status.STATUS_CODE_UNSET, "the client's error is none of the server"
    assert attributes(failed).items() >= {("error.type", "engine_broken"), ("http.response.status_code", 503)}
    assert failed.status.code == failed.status.STATUS_CODE_ERROR
    assert unknown.name == "GET unmatched"
    (infer,) = (span for span in collector.spans if span.name == "infer")
    assert (infer.trace_id, infer.parent_span_id) == (failed.trace_id, failed.span_id)
    assert infer.status.code == infer.status.STATUS_CODE_ERROR
    assert attributes(infer)["error.type"] == "EngineBroken"
    assert len({span.trace_id for span in collector.spans}) == 3, "each request without a parent begins its own"
    assert SECRET not in str(collector.spans)


def test_a_collector_that_is_away_or_hangs_harms_no_request_and_no_end(
    bundle: Bundle, triton: tuple[Triton, str], caplog: pytest.LogCaptureFixture
) -> None:
    class Hanging(Collector):
        def Export(self, request: Any, context: Any) -> Any:
            while context.is_active():
                time.sleep(0.05)

    def ask(client: httpx.Client) -> None:
        for _ in range(50):
            assert client.post("/v1/answer", json=ASKED).status_code == 200

    traced(bundle, triton[1], "127.0.0.1:1", ask)
    with listening(trace_service_pb2_grpc.add_TraceServiceServicer_to_server, Hanging()) as address:
        traced(bundle, triton[1], address, ask)
    assert SECRET not in caplog.text


def test_no_sdk_and_no_exporter_is_loaded_without_a_collector(bundle: Bundle, triton: tuple[Triton, str]) -> None:
    program = (
        "import sys, service.app; service.app.create_app(service.app.Settings())\n"
        "print([name for name in sys.modules if name.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == "[]\n"
    app = create_app(Settings(triton_url=triton[1]), bundle=bundle)
    with serving(app) as url:
        headers = {"traceparent": f"00-{TRACE}-{CALLER}-01"}
        assert httpx.post(f"{url}/v1/answer", json=ASKED, headers=headers, trust_env=False).status_code == 200
    assert not any(triton[0].parents)
