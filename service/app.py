"""Create the application from its parts, and start and stop them.

Run it from the root of the repository with ``uvicorn --factory service.app:create_app``.
"""

import asyncio
import gc
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from bertqa.manifest import Bundle, BundleMismatch
from bertqa.repository import Repository
from service.api import hugging_face, operations, v1
from service.api.errors import respond
from service.api.json_body import JsonRoutes
from service.api.openapi import AUTH, DESCRIPTION, DescribedApplication, described
from service.api.operations import PROBE_S, own_version
from service.api_keys import Keyring, KeysError
from service.inference.cache import CachedPipeline
from service.inference.pipeline import Pipeline
from service.inference.probe import check_ready
from service.inference.registry import ModelRegistry, ServedModel, default_model
from service.inference.watcher import RepositoryWatcher
from service.middleware.access_log import AccessLogMiddleware
from service.middleware.auth import AuthMiddleware, needs_key
from service.middleware.body_limit import BodyLimitMiddleware
from service.middleware.cors import CrossOriginMiddleware
from service.middleware.draining import DrainingMiddleware
from service.middleware.errors import ErrorMiddleware
from service.middleware.request_context import RequestContextMiddleware
from service.middleware.security_headers import SecurityHeadersMiddleware
from service.middleware.tracing import TracingMiddleware
from service.observability import logging as logs
from service.observability import tracing
from service.observability.metrics import Metrics
from service.services import Services
from service.settings import Settings, SettingsError
from service.shutdown import Shutdown, clean_up
from service.triton.channels import Channels, EngineFactory
from service.triton.errors import EngineError

log = logging.getLogger("bertqa.service")

_WATCH_S = 0.5

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[dict[str, Any]]]


def create_app(
    settings: Settings | None = None, *, engine: EngineFactory | None = None, bundle: Bundle | None = None
) -> FastAPI:
    """Create the application; settings default to the environment, bundles and engines to the settings.

    Without a bundle, it serves every model of the repository and switches to versions that become active there. It does
    not start with an engine that does not belong to its bundle (`bertqa.manifest.BundleMismatch`). It does start before
    the engine is up: until the engine answers and the check passes, ``/health/ready`` fails and questions get 503.
    """
    metrics, own_process = Metrics(), settings is None
    try:
        settings = Settings.from_environment(os.environ) if settings is None else settings
        keyring = Keyring(Path(settings.api_keys_file)) if settings.api_keys_file else None
        if own_process and not bundle:
            default_model(Repository(settings.repository), settings.model or None)  # so that this error is one line too
    except (SettingsError, KeysError, BundleMismatch) as error:
        if own_process:
            sys.exit(f"bertqa: error: {error}")
        raise
    if own_process:
        logs.configure(settings, count_lost=metrics.lost_records)
    services = Services(
        settings=settings,
        metrics=metrics,
        shutdown=Shutdown(settings.shutdown_delay_s),
        keyring=keyring,
    )
    app = DescribedApplication(
        title="bertqa",
        description=DESCRIPTION,
        version=own_version(),
        lifespan=_lifespan(services, engine, bundle),
        redirect_slashes=False,
        openapi_url=None if settings.docs == "off" else "/openapi.json",
        docs_url=None,  # FastAPI's pages load their scripts from a CDN
        redoc_url=None,
        telemetry={
            "tracing": False,
            "metrics": False,
            "logs": False,
        },  # otherwise checked on each request; we have our own
    )
    app.state.services = services
    _add_middleware(app, services)
    for exception in (HTTPException, RequestValidationError):  # replaces FastAPI's own handlers
        app.add_exception_handler(exception, _respond)
    needs_keys = services.keyring is not None
    for router in (v1.router, hugging_face.router):
        app.include_router(router, responses=described(*AUTH) if needs_keys else {})
    operations.add_routes(app, settings, guarded=lambda path: needs_keys and needs_key("GET", path, settings))
    return app


def _add_middleware(app: FastAPI, services: Services) -> None:
    """Add the layers around the routes; the last one added is the outermost."""
    settings, metrics = services.settings, services.metrics
    app.add_middleware(JsonRoutes, routes=[*v1.router.routes, *hugging_face.router.routes])
    app.add_middleware(BodyLimitMiddleware, max_bytes=settings.max_body_bytes)
    if services.keyring:
        app.add_middleware(AuthMiddleware, keyring=services.keyring, metrics=metrics, settings=settings)
    app.add_middleware(ErrorMiddleware)
    if settings.allowed_origins:
        app.add_middleware(CrossOriginMiddleware, origins=settings.allowed_origins)
    if settings.otlp_endpoint:
        app.add_middleware(TracingMiddleware)
    app.add_middleware(DrainingMiddleware, shutdown=services.shutdown)
    app.add_middleware(SecurityHeadersMiddleware)
    app.add_middleware(AccessLogMiddleware, metrics=metrics, logs=settings.access_log)
    app.add_middleware(RequestContextMiddleware, keeps_texts=settings.log_texts)


async def _respond(request: Request, error: Exception) -> Response:
    return respond(request.scope, error)


def _lifespan(services: Services, engine: EngineFactory | None, bundle: Bundle | None) -> Lifespan:
    settings, metrics = services.settings, services.metrics

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
        services.pipeline = services.answering = pipeline = Pipeline(models, settings, metrics)
        if settings.cache_mb:
            services.answering = CachedPipeline(pipeline, settings.cache_mb << 20, metrics)
        metrics.built(version=own_version())
        metrics.serves(each.bundle for each in models)
        _tune_garbage_collector()
        services.shutdown.listen()
        following = [asyncio.create_task(_watch(pipeline, metrics))]
        try:
            await _verify_if_up(models)
            if not bundle:
                following.append(asyncio.create_task(watcher.follow(models, partial(check_ready, pipeline))))
            if services.keyring:
                following.append(asyncio.create_task(services.keyring.follow()))
            yield {"services": services}  # for `service.runtime.http_protocol`
        finally:
            for task in following:
                task.cancel()
            await asyncio.gather(*following, return_exceptions=True)
            pipeline.close()
            services.metrics_thread.shutdown(wait=False, cancel_futures=True)
            if engine is None:
                await triton.close()
            await clean_up(tracing.stop)
            await clean_up(logs.flush)

    return lifespan


def _tune_garbage_collector() -> None:
    # Objects loaded so far stay until the end: exclude them from collections.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)  # a request makes over a thousand short-lived tuples and few cycles


async def _watch(pipeline: Pipeline, metrics: Metrics) -> None:
    """Measure event loop lag and queue wait until cancelled."""
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
        except EngineError as error:
            log.warning("the engine is not up yet; its identity will be checked later: %s", error)
