"""The application: its parts, its start and end, and the routes that are not questions.

Run it from the repository's root with ``uvicorn --factory service.app:create_app``.
"""

import asyncio
import gc
import logging
import os
import platform
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from bertqa.errors import InvalidArgument
from bertqa.manifest import Bundle, BundleMismatch
from bertqa.repository import Repository
from service.api import errors, hugging_face, v1
from service.api.exchange import DEADLINE_HEADER, pipeline_of
from service.api.schemas import LONGEST_ANSWER_TOKENS, MAX_TOP_K, Health, Info
from service.inference.cache import CachedPipeline
from service.inference.pipeline import Pipeline
from service.inference.probe import check_ready, is_ready
from service.inference.registry import ModelRegistry, ServedModel, default_model
from service.inference.watcher import RepositoryWatcher
from service.inference.worker_pool import Watchman
from service.keys import Guard, Keyring, KeysError, needs_key
from service.middleware.edge import Edge
from service.observability import logging as logs
from service.observability import tracing
from service.observability.metrics import Metrics
from service.observability.readiness import ReadinessLog
from service.runtime.shutdown import Shutdown, clean_up
from service.settings import Settings, SettingsError
from service.triton.channels import Channels, EngineFactory
from service.triton.errors import ModelError

log = logging.getLogger("bertqa.service")

PAGE = Path(__file__).parent / "api" / "static"
PROBE_S = 1.0
"""Seconds that a readiness probe, or the check at start, may take."""

_WATCH_S = 0.5

_DESCRIPTION = """Extractive question answering: answers are spans of the texts given, with exact offsets.

Errors have one shape on every route: `{"error": sentence, "error_type": name, "field": name or null}`. Every response
to a request that arrived whole has an `x-request-id`, the client's own if it sent one."""


def create_app(
    settings: Settings | None = None, *, engine: EngineFactory | None = None, bundle: Bundle | None = None
) -> FastAPI:
    """Make the application; settings that are not given come from the environment, bundles and engines from those.

    Without a bundle it serves every model of the repository and follows what becomes active there. Starting refuses an
    engine that is not the one which its bundle describes (`bertqa.manifest.BundleMismatch`), but not one that is not up
    yet: until it is, and the check has passed, ``/health/ready`` fails and questions get 503.
    """
    metrics, own_process = Metrics(), settings is None
    try:
        settings = Settings.from_environment(os.environ) if settings is None else settings
        keyring = Keyring(Path(settings.api_keys_file)) if settings.api_keys_file else None
        if own_process and not bundle:
            default_model(Repository(settings.repository), settings.model or None)  # a mistake there is one line too
    except (SettingsError, KeysError, BundleMismatch) as error:
        if own_process:
            sys.exit(f"bertqa: error: {error}")
        raise
    if own_process:
        logs.configure(settings, count_lost=metrics.lost_records)
    shutdown = Shutdown(settings.shutdown_delay_s)
    scraper = Watchman("metrics")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        if settings.otlp_endpoint:
            try:
                tracing.start(settings, own_version())
            except ImportError as error:
                log.warning("no traces: %s; %s", error, tracing.INSTALL)
        triton = engine or Channels.from_settings(settings, watch_circuit=metrics.circuit)
        watcher = RepositoryWatcher(Repository(settings.repository), triton, metrics, settings)
        if bundle:
            models = ModelRegistry(bundle.model, {bundle.model: ServedModel(bundle, triton, metrics, settings)})
        else:
            models = watcher.start(settings.model or None)
        app.state.pipeline = pipeline = Pipeline(models, settings, metrics)
        cached = CachedPipeline(pipeline, settings.cache_mb << 20, metrics) if settings.cache_mb else None
        app.state.answering = cached or pipeline
        metrics.built(version=own_version())
        metrics.serves(each.bundle for each in models)
        # What is loaded by now stays for good: the garbage collector need not walk it with every full collection.
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000, 10, 10)  # a request makes over a thousand short-lived tuples, and no cycles of note
        shutdown.listen()
        following = [asyncio.create_task(_watch(pipeline, metrics))]
        try:
            await _verify_if_up(models)
            if not bundle:
                following.append(asyncio.create_task(watcher.follow(models, partial(check_ready, pipeline))))
            if keyring:
                following.append(asyncio.create_task(keyring.follow()))
            yield {
                "settings": settings,
                "metrics": metrics,
                "memory": pipeline.memory,
            }  # for the protocol
        finally:
            for task in following:
                task.cancel()
            await asyncio.gather(*following, return_exceptions=True)
            pipeline.close()
            scraper.close()
            if engine is None:
                await triton.close()
            await clean_up(tracing.stop)
            await clean_up(logs.flush)

    app = _Application(
        title="bertqa",
        description=_DESCRIPTION,
        version=own_version(),
        lifespan=lifespan,
        redirect_slashes=False,
        openapi_url=None if settings.docs == "off" else "/openapi.json",
        docs_url=None,  # FastAPI's pages load their scripts from a CDN
        redoc_url=None,
    )
    app.state.metrics, app.state.shutdown, app.state.scraper = metrics, shutdown, scraper
    app.state.readiness = ReadinessLog()
    # The last one added is the first that a request meets.
    if keyring:
        app.add_middleware(Guard, keyring=keyring, metrics=metrics, settings=settings)
    if settings.allowed_origins:
        app.add_middleware(
            _CrossOrigin,
            allow_origins=settings.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-api-key", "x-request-id", DEADLINE_HEADER],
            expose_headers=["x-request-id", "server-timing", "retry-after"],
            max_age=600,
        )
    if settings.otlp_endpoint:
        app.add_middleware(tracing.Traced)
    app.add_middleware(Edge, metrics=metrics, settings=settings, shutdown=shutdown)
    errors.register(app)
    guarded = errors.described(*errors.GUARD) if keyring else {}
    app.include_router(v1.router, responses=guarded)
    app.include_router(hugging_face.router, responses=guarded)
    app.add_api_route("/", _page, methods=["HEAD"], include_in_schema=False)

    def operate(path: str, endpoint: Callable[..., Any], *raised: type[Exception], **options: Any) -> None:
        guard = errors.GUARD if keyring and needs_key("GET", path, settings) else ()
        responses = errors.described(*raised, *guard)
        app.add_api_route(path, endpoint, responses=responses, tags=["Operation"], **options)

    operate("/", _page, response_class=HTMLResponse)
    operate("/health/live", _live, response_model=Health)
    operate("/health/ready", _ready, InvalidArgument, errors.Stopping, *errors.ENGINE, response_model=Health)
    operate("/info", _info, response_model=Info)
    if settings.metrics != "off":
        operate("/metrics", _metrics, response_class=PlainTextResponse)
    if settings.docs != "off":
        app.add_api_route("/docs", _docs, methods=["GET", "HEAD"], include_in_schema=False)
        app.mount("/static/swagger", _WholeFiles(packages=[("fastapi_offline", "static")]))
    app.mount("/static", _WholeFiles(directory=PAGE))
    return app


class _Application(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """The description of the API, with the header that every response has, and where a key is needed."""
        if not self.openapi_schema:
            document = super().openapi()
            request_id = {"description": "The client's own, or a new one.", "schema": {"type": "string"}}
            for operations in document["paths"].values():
                for operation in operations.values():
                    for response in operation["responses"].values():
                        response.setdefault("headers", {})["x-request-id"] = request_id
                    if "401" in operation["responses"]:
                        operation["security"] = [{"api_key": []}]
                        document["components"]["securitySchemes"] = {"api_key": {"type": "http", "scheme": "bearer"}}
        return super().openapi()


class _CrossOrigin(CORSMiddleware):
    """Whose refusals are in the API's one shape, and counted."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except errors.CrossOriginRefused as error:
            await errors.respond(scope, error)(scope, receive, send)

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code != 200:
            raise errors.CrossOriginRefused(bytes(response.body).decode())
        return response


class _WholeFiles(StaticFiles):
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Ranges may be ignored (RFC 9110, section 14.2); Starlette's errors about them are not in the API's one shape.
        headers = [(name, value) for name, value in scope["headers"] if name != b"range"]
        await super().__call__({**scope, "headers": headers}, receive, send)


def own_version() -> str:
    """Version of bertqa, or a word for a checkout that is not installed."""
    try:
        return version("bertqa")
    except PackageNotFoundError:
        return "checkout"


async def _watch(pipeline: Pipeline, metrics: Metrics) -> None:
    """Measure, as long as the application lives, what no request tells."""
    loop = asyncio.get_running_loop()
    while True:
        wanted = loop.time() + _WATCH_S
        await asyncio.sleep(_WATCH_S)
        metrics.loop_lag.observe(max(loop.time() - wanted, 0))
        metrics.queue_wait.set(pipeline.expected_wait())


async def _verify_if_up(models: ModelRegistry) -> None:
    for model in models:
        try:
            await model.verify(deadline=time.monotonic() + PROBE_S)
        except ModelError as error:
            log.warning("the engine is not up yet, its identity will be checked when it is: %s", error)


async def _page() -> Response:
    """The page that asks in a browser."""
    return HTMLResponse((PAGE / "index.html").read_bytes(), headers={"cache-control": "no-cache"})


async def _docs() -> Response:
    return HTMLResponse((PAGE / "docs.html").read_bytes(), headers={"cache-control": "no-cache"})


async def _live() -> Health:
    """The process answers; says nothing about the engine."""
    return Health(status="live")


async def _ready(request: Request, model: str | None = None) -> Health:
    """The default model or another answers a question within a second, or did so within the last one."""
    if request.app.state.shutdown.has_begun:
        raise errors.Stopping("The service is about to end; ask another replica.")
    pipeline = pipeline_of(request)
    probed = pipeline.registry[model]
    with request.app.state.readiness.probing(probed.bundle.model):
        await is_ready(pipeline, probed, PROBE_S)
    return Health(status="ready")


async def _info(request: Request) -> Info:
    """What runs here, within which limits, and what is switched on."""
    pipeline = pipeline_of(request)
    settings, bundle = pipeline.settings, pipeline.registry[None].bundle
    numbers = [name for name, field in Settings.model_fields.items() if field.annotation in (int, float)]
    triton: str | None = None
    with suppress(ModelError):
        triton = await pipeline.registry[None].admin.server_version(deadline=time.monotonic() + PROBE_S)
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


async def _metrics(request: Request) -> Response:
    """Metrics of this process, in Prometheus' text format."""
    metrics: Metrics = request.app.state.metrics
    metrics.tasks.set(len(asyncio.all_tasks()))
    scraper: Watchman = request.app.state.scraper
    return Response(await scraper.run(metrics.text), headers={"content-type": CONTENT_TYPE_LATEST})
