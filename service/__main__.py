"""Start everything that answering needs and keep it alive: Triton with the engine, and the REST service before it.

``python -m service`` builds the engine first where there is none yet. Ctrl-C or SIGTERM ends the service, which drains,
then Triton.
"""

if __name__ == "__main__":  # before the imports, of which --help needs none
    from bertqa.command import run
    from service.commands.serve import app

    run(app, "bertqa serve")

import contextlib
import http.client
import logging
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bertqa.manifest import MODEL_NAME, WEIGHTS_FILE, BundleMismatch, OtherFormat, changed_files, rebuild, sha256_of
from bertqa.repository import ChangeRefused, Repository
from service import logs
from service.commands.serve import ServeOptions
from service.embedded_triton import (
    LOOPBACK,
    EmbeddedTriton,
    TritonError,
    TritonPorts,
    die_with_parent,
    end_session,
    free_port,
    restart_pauses,
)
from service.settings import Settings

log = logging.getLogger(logs.LAUNCHER)

PROJECT = Path(__file__).resolve().parent.parent
DRAIN_S = 15
"""Seconds that requests in progress get when the service is told to end."""
OPEN_FILES = 16_384
"""That a process of the service may have, where the system lets us say so."""
_READY_TIMEOUT_S = 60.0


class LaunchError(RuntimeError):
    """The service cannot be started; the message says why and what to do."""


def launch(args: ServeOptions) -> int:
    """Run until told to end; returns the process's exit code."""
    try:
        logs.configure(Settings.from_environment(os.environ))
    except ValueError as error:
        print(f"bertqa: error: {error}", file=sys.stderr)
        return 1
    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.set())
    try:
        if args.triton_url and not Repository(args.repository).serving():
            raise LaunchError(
                f"--repository {args.repository}: holds no model; with --triton-url, nothing is built: name the model "
                "repository of that Triton, or a copy of it"
            )
        ensure_engine(args.repository, args.checkpoint, stopping)
        if stopping.is_set():
            log.info("ended")
            return 0
        port = free_port(args.host, args.port)
        if port != args.port and args.port:
            raise LaunchError(f"--port {args.port}: another process uses it; choose another, or 0 for any free one")
        with contextlib.ExitStack() as stack:
            url = args.triton_url
            if not url:
                settle(Repository(args.repository))
                ports = TritonPorts(grpc=_grpc_port(args))
                triton = EmbeddedTriton(
                    args.repository, ports=ports, avoid_ports=(port,), log_dir=args.log_dir, report=log.info
                )
                stack.callback(triton.stop)
                triton.start(stopping)
                url = triton.url
            if not stopping.is_set():
                scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bertqa-service-")))
                serve(args, port, url, stopping, scratch)
    except (LaunchError, TritonError, BundleMismatch, ChangeRefused) as error:
        log.error("error: %s", error)
        return 1
    log.info("ended")
    return 0


def _grpc_port(args: ServeOptions) -> int:
    wanted = TritonPorts.grpc if args.triton_grpc_port is None else args.triton_grpc_port
    if args.triton_grpc_port and free_port(LOOPBACK, wanted) != wanted:
        raise LaunchError(
            f"--triton-grpc-port {wanted}: another process uses it; choose another, or 0 for any free one"
        )
    return wanted


def ensure_engine(root: Path, checkpoint: Path | None, stopping: threading.Event) -> None:
    """See to it that the repository holds an engine of the checkpoint, or any if none is named, and that it answers.

    One that was built before is taken up again; else one is built for the CPU. Ends the build if `stopping` is set.

    Raises:
        LaunchError: there is no checkpoint to build from, or the builder failed.
        BundleMismatch: the version in the repository is not whole.
    """
    repository = Repository(root)
    models = repository.serving()
    reason = f"no engine in {root} yet"
    if checkpoint is None and models:
        for model in models:
            repository.open(model)
        return
    if MODEL_NAME in models and checkpoint:
        found = _version_of(repository, sha256_of(checkpoint / WEIGHTS_FILE), models[MODEL_NAME].active)
        if found:
            repository.open(MODEL_NAME, found)
            if found != models[MODEL_NAME].active:
                repository.activate(MODEL_NAME, found, alone=True)
            return
        reason = f"the engines in {root} are of other checkpoints, or of an earlier release"
    if checkpoint is None:
        weights = sorted(path.parent for path in PROJECT.glob(f"checkpoints/*/{WEIGHTS_FILE}"))
        if len(weights) != 1:
            raise LaunchError(
                f"{root / MODEL_NAME}: holds no built version, and checkpoints/ holds {len(weights)} checkpoints "
                "to build one from; name one with --checkpoint DIR"
            )
        checkpoint = weights[0]
    log.info("%s: building one from %s, once", reason, checkpoint)
    command = [sys.executable, "-m", "engine_builder", "--checkpoint", str(checkpoint.resolve()), "--target", "cpu"]
    command += ["--repository", str(root.resolve())]
    with _child(command, os.environ, logs.BUILDER, end_s=DRAIN_S, cwd=PROJECT) as builder:
        while builder.poll() is None and not stopping.wait(0.1):
            pass
    if builder.returncode and not stopping.is_set():
        raise LaunchError(f"the engine could not be built (exit code {builder.returncode}); its output is above")
    if not stopping.is_set():
        repository.activate(MODEL_NAME, repository.versions(MODEL_NAME)[-1], alone=True)


def _version_of(repository: Repository, checkpoint_sha256: str, active: int) -> int | None:
    """The active version if it was built from the checkpoint, else the latest one that was."""
    for version in (active, *reversed(repository.versions(MODEL_NAME))):
        with contextlib.suppress(OtherFormat):
            if repository.manifest(MODEL_NAME, version).checkpoint_sha256 == checkpoint_sha256:
                return version
    return None


def settle(repository: Repository) -> None:
    """Make the repository fit for a Triton that is about to start: it would load all versions of a model or none.

    What is loaded beside the active version and is not whole any more is left out; a configuration that was not
    generated from what is there now is written anew.

    Raises:
        BundleMismatch: an active version is not whole.
        ChangeRefused: something must change, and the repository cannot be written to.
    """
    for model, serving in repository.serving().items():
        for version in serving.loaded:
            try:
                manifest = repository.manifest(model, version)
                if changed := changed_files(repository.directory(model, version), manifest):
                    mend = rebuild(manifest.target)
                    raise BundleMismatch(f"{model} {version}: {changed[0]} is not as it was published; {mend}")
            except BundleMismatch as error:
                if version == serving.active:
                    raise
                log.warning("%s; going on without it", error)
                repository.unload(model, version)
        if not repository.is_configured(model):
            repository.configure(model)


def serve(args: ServeOptions, port: int, triton_url: str, stopping: threading.Event, scratch: Path) -> None:
    """Run the REST service, restarting it when it dies, until `stopping` is set; `scratch` is an empty directory.

    Raises:
        LaunchError: it did not start the first time, or its settings are none.
    """
    try:
        patience_s = Settings.from_environment(os.environ).shutdown_delay_s + DRAIN_S + 5
    except ValueError as error:
        raise LaunchError(str(error)) from None
    command = [sys.executable, "-m", "uvicorn", "service.app:create_app", "--factory", f"--app-dir={PROJECT}"]
    command += [
        f"--host={args.host}",
        f"--port={port}",
        f"--workers={args.workers}",
        "--loop=uvloop",
        "--http=service.protocol:BoundedProtocol",
    ]
    command += [
        f"--timeout-graceful-shutdown={DRAIN_S}",
        "--no-access-log",
        "--no-server-header",
        "--log-level=warning",
    ]
    # A shell's usual limit of 1024 open files is fewer than a process may have connections.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < OPEN_FILES <= hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, hard))
    environment = os.environ | {
        "BERTQA_TRITON_URL": triton_url,
        "BERTQA_REPOSITORY": str(args.repository.resolve()),
    }
    if not args.triton_url:  # our own speaks no TLS, whatever another one would want
        environment |= dict.fromkeys(("BERTQA_TRITON_TLS_CA", "BERTQA_TRITON_TLS_CERT", "BERTQA_TRITON_TLS_KEY"), "")
    for start, pause in enumerate(restart_pauses()):
        if stopping.wait(pause):
            return
        if args.workers > 1:  # they count in files, which must be new with them
            environment["PROMETHEUS_MULTIPROC_DIR"] = str(scratch / str(start))
            (scratch / str(start)).mkdir()
        began, ready = time.monotonic(), False
        with _child(command, environment, logs.OUTPUT, end_s=patience_s) as process:
            while process.poll() is None and not stopping.wait(0.5 if ready else 0.1):
                if not ready and _is_ready(args.host, port):
                    ready = True
                    log.info("ready at http://%s:%d", _reachable(args.host), port)
                elif not start and not ready and time.monotonic() - began > _READY_TIMEOUT_S:
                    raise LaunchError(f"the service was not ready after {_READY_TIMEOUT_S:.0f} s")
        if stopping.is_set():
            return
        if not start and not ready:
            raise LaunchError(f"the service ended with exit code {process.returncode}; its output is above")
        log.warning("the service ended with exit code %s; restarting", process.returncode)


@contextlib.contextmanager
def _child(
    command: Sequence[str], environment: Mapping[str, str], logger: str, *, end_s: float, cwd: Path | None = None
) -> "Iterator[subprocess.Popen[bytes]]":
    """A process that ends with us, and has so many seconds to do so.

    Where the log is JSON, so is each line that it writes, whoever in it does: gRPC's core writes past every log. The
    service's own log goes past us, to where ours goes, so that it waits for nobody and knows what is lost.
    """
    settings = Settings.from_environment(environment)
    options: dict[str, Any] = {}
    if settings.log_format == "json":
        environment = {**environment, "BERTQA_LOG_TO": "stdout", "TQDM_DISABLE": "1"}
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        if logger == logs.OUTPUT:
            options = {"stdout": logs.DESCRIPTORS[settings.log_to], "stderr": subprocess.PIPE}
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        start_new_session=True,  # Ctrl-C comes to us alone, and we end things in order
        preexec_fn=die_with_parent(signal.SIGTERM),  # noqa: PLW1509  calls nothing that takes a lock
        **options,
    )
    reader = threading.Thread(target=_log_lines, args=(process, logger), name="lines", daemon=True)
    reader.start()
    try:
        yield process
    finally:
        end_session(process, end_s)
        reader.join(5)


def _log_lines(process: "subprocess.Popen[bytes]", logger: str) -> None:
    level = logging.WARNING if logger == logs.OUTPUT else logging.INFO
    for output in filter(None, (process.stderr, process.stdout)):
        with output:
            for line in output:
                if text := line.decode(errors="replace").strip():
                    logging.getLogger(logger).log(level, "%s", text)


def _is_ready(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(_reachable(host).strip("[]"), port, timeout=5)
    try:
        connection.request("GET", "/health/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _reachable(host: str) -> str:
    """The host part of a URL under which this machine reaches a service that listens on ``host``."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host
