"""OpenTelemetry traces of requests (HTTP → tokenize → infer → decode), sent over OTLP; off until `start` is called.

Until then neither the SDK nor an exporter is imported, and `span` and `metadata` only check a variable. The trace
context comes from the client's ``traceparent`` and is passed to Triton as gRPC metadata. Spans contain counts, names
and outcomes, never a question, a context or an exception message. A thread with a bounded queue sends them, so a slow
or unreachable collector loses spans but has no other effect.

Attributes follow https://opentelemetry.io/docs/specs/semconv/http/http-spans/; our own begin with ``bertqa.``.
"""

import contextlib
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

from service.observability.request_context import RequestContext
from service.settings import Settings

INSTALL = "pip install --constraint constraints.txt --editable '.[tracing]' in a checkout of the project"
_STOP_S = 3.0
_UNTRACED = ("/health/", "/metrics", "/static/")
_NOTHING: AbstractContextManager[None] = contextlib.nullcontext()

_provider: Any = None
_exporter: Any = None
_tracer: Any = None  # None: off


def start(settings: Settings, version: str) -> None:
    """Start tracing; the standard ``OTEL_`` variables set sampler, batches and headers.

    Raises:
        ImportError: the packages are not installed.
    """
    global _provider, _exporter, _tracer  # noqa: PLW0603
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter  # noqa: PLC0415

    exporter: SpanExporter
    if settings.otlp_protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter  # noqa: PLC0415

        exporter = OTLPSpanExporter(endpoint=settings.otlp_endpoint)
    else:
        from opentelemetry.exporter.otlp.proto.http import trace_exporter  # noqa: PLC0415

        exporter = trace_exporter.OTLPSpanExporter(endpoint=f"{settings.otlp_endpoint.rstrip('/')}/v1/traces")
    own = Resource({"service.name": "bertqa", "service.version": version})
    _exporter = exporter
    _provider = TracerProvider(resource=own.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
    _provider.add_span_processor(BatchSpanProcessor(exporter))
    _tracer = _provider.get_tracer("bertqa", version)


def stop() -> None:
    """Stop tracing, and send the remaining spans within a few seconds."""
    global _tracer  # noqa: PLW0603
    if not is_on():
        return
    _tracer = None
    end = threading.Thread(target=_provider.shutdown, name="tracing-end", daemon=True)
    end.start()
    end.join(_STOP_S)
    if end.is_alive():  # it would keep retrying for half a minute
        _exporter.shutdown()
        end.join(_STOP_S)


def is_on() -> bool:
    """Return whether tracing is on."""
    return _tracer is not None


def span(name: str, *, calls: bool = False, **attributes: str | int) -> AbstractContextManager[Any]:
    """Return a context manager for a part of the current request; it yields the span, or None if tracing is off.

    Args:
        name: name of the span.
        calls: whether it is a call to another server.
        attributes: attributes, without their prefix ``bertqa.``.
    """
    return _part(name, calls, attributes) if _tracer is not None else _NOTHING


def metadata() -> tuple[tuple[str, str], ...] | None:
    """Return gRPC metadata with the current span, for the called server; None if tracing is off."""
    if _tracer is None:
        return None
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return tuple(carrier.items())


@contextlib.contextmanager
def _part(name: str, calls: bool, attributes: dict[str, str | int]) -> Iterator[Any]:
    from opentelemetry.trace import SpanKind, StatusCode, get_current_span  # noqa: PLC0415

    if not get_current_span().get_span_context().is_valid:  # e.g. of a probe
        yield None
        return
    with _tracer.start_as_current_span(
        name,
        kind=SpanKind.CLIENT if calls else SpanKind.INTERNAL,
        attributes={f"bertqa.{key}": value for key, value in attributes.items()},
        record_exception=False,  # the message may quote a text
        set_status_on_exception=False,
    ) as part:
        try:
            yield part
        except BaseException as error:
            part.set_attribute("error.type", type(error).__qualname__)
            part.set_status(StatusCode.ERROR)
            raise


def server_span(scope: Mapping[str, Any]) -> AbstractContextManager[Any]:
    """Start the span of a request, as a child of the client's span if it sent one; only while `is_on`.

    Args:
        scope: ASGI scope of the request.
    """
    from opentelemetry.trace import SpanKind  # noqa: PLC0415
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

    sent = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
    span: AbstractContextManager[Any] = _tracer.start_as_current_span(
        scope["method"],
        context=TraceContextTextMapPropagator().extract(sent),
        kind=SpanKind.SERVER,
        attributes={"http.request.method": scope["method"], "url.scheme": scope["scheme"]},
        record_exception=False,
        set_status_on_exception=False,
    )
    return span


def end_server_span(span: Any, method: str, route: str, status: int, context: RequestContext) -> None:
    """Write the outcome of a request to its span; status 0 means no response."""
    from opentelemetry.trace import StatusCode  # noqa: PLC0415

    span.update_name(f"{method} {route}")
    span.set_attributes({"http.route": route, "bertqa.request_id": context.request_id})
    span.set_attributes({f"bertqa.{name}": value for name, value in context.fields().items()})
    if status:
        span.set_attribute("http.response.status_code", status)
    if context.error_type:
        span.set_attribute("error.type", context.error_type)
    if status >= 500:
        span.set_status(StatusCode.ERROR)
