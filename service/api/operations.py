"""Routes for operators and browsers: the page, health, info, metrics and the OpenAPI description."""

import asyncio
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from bertqa.errors import InvalidArgument
from service.api.errors import Stopping
from service.api.openapi import AUTH, ENGINE, described
from service.api.schemas import LONGEST_ANSWER_TOKENS, MAX_TOP_K, Health, Info
from service.inference.probe import is_ready
from service.observability import tracing
from service.services import services_of
from service.settings import Settings
from service.triton.errors import EngineError

PAGE = Path(__file__).parent / "static"
PROBE_S = 1.0
"""Timeout of a readiness probe, in seconds."""


def add_routes(app: FastAPI, settings: Settings, *, guarded: Callable[[str], bool]) -> None:
    """Add the routes of this module to an application.

    Args:
        app: the application.
        settings: decide whether there are metrics and an OpenAPI description.
        guarded: returns whether a path needs an API key.
    """

    def operate(path: str, endpoint: Callable[..., Any], *raised: type[Exception], **options: Any) -> None:
        responses = described(*raised, *(AUTH if guarded(path) else ()))
        app.add_api_route(path, endpoint, responses=responses, tags=["Operation"], **options)

    app.add_api_route("/", page, methods=["HEAD"], include_in_schema=False)
    operate("/", page, response_class=HTMLResponse)
    operate("/health/live", live, response_model=Health)
    operate("/health/ready", ready, InvalidArgument, Stopping, *ENGINE, response_model=Health)
    operate("/info", info, response_model=Info)
    if settings.metrics != "off":
        operate("/metrics", metrics, response_class=PlainTextResponse)
    if settings.docs != "off":
        app.add_api_route("/docs", docs, methods=["GET", "HEAD"], include_in_schema=False)
        app.mount("/static/swagger", _WholeFiles(packages=[("fastapi_offline", "static")]))
    app.mount("/static", _WholeFiles(directory=PAGE))


class _WholeFiles(StaticFiles):
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Ranges may be ignored (RFC 9110, section 14.2). Starlette's errors about them do not have our format.
        headers = [(name, value) for name, value in scope["headers"] if name != b"range"]
        await super().__call__({**scope, "headers": headers}, receive, send)


def own_version() -> str:
    """Return the version of bertqa, or a word for a checkout that is not installed."""
    try:
        return version("bertqa")
    except PackageNotFoundError:
        return "checkout"


async def page() -> Response:
    """Return the web page for questions."""
    return HTMLResponse((PAGE / "index.html").read_bytes(), headers={"cache-control": "no-cache"})


async def docs() -> Response:
    """Return the page with the API documentation."""
    return HTMLResponse((PAGE / "docs.html").read_bytes(), headers={"cache-control": "no-cache"})


async def live() -> Health:
    """Report that the process is alive; says nothing about the engine."""
    return Health(status="live")


async def ready(request: Request, model: str | None = None) -> Health:
    """Report whether the default model, or the named one, answers a question within a second, now or a second ago."""
    services = services_of(request)
    if services.shutdown.has_begun:
        raise Stopping("The service is shutting down; use another replica.")
    probed = services.pipeline.registry[model]
    with services.readiness_log.probing(probed.bundle.model):
        await is_ready(services.pipeline, probed, PROBE_S)
    return Health(status="ready")


async def info(request: Request) -> Info:
    """Return the model, the limits, the versions and the features that are on."""
    services = services_of(request)
    settings, model = services.settings, services.pipeline.registry[None]
    bundle = model.bundle
    numbers = [name for name, field in Settings.model_fields.items() if field.annotation in (int, float)]
    triton: str | None = None
    with suppress(EngineError):
        triton = await model.admin.server_version(deadline=time.monotonic() + PROBE_S)
    return Info(
        model=bundle.manifest.identity,
        version=bundle.version,
        manifest=asdict(bundle.manifest),
        limits={
            **{name: getattr(settings, name) for name in numbers},
            "max_top_k": MAX_TOP_K,
            "max_answer_tokens": LONGEST_ANSWER_TOKENS,
        },
        versions={
            "bertqa": own_version(),
            "triton": triton,
            "python": platform.python_version(),
            **{name: version(name) for name in ("fastapi", "uvicorn", "tokenizers", "numpy")},
        },
        switches={
            "access_log": settings.access_log,
            "log_texts": settings.log_texts,
            "tracing": tracing.is_on(),
            "auth": bool(settings.api_keys_file),
            "cache": settings.cache_mb > 0,
            "metrics": settings.metrics,
            "docs": settings.docs,
        },
    )


async def metrics(request: Request) -> Response:
    """Return metrics in the text format of Prometheus."""
    services = services_of(request)
    services.metrics.tasks.set(len(asyncio.all_tasks()))
    text = await asyncio.get_running_loop().run_in_executor(services.metrics_thread, services.metrics.text)
    return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})
