"""Start Triton with the engine and the REST service in front of it, and restart them when they die.

The launcher first builds the engine if there is none. On Ctrl-C or SIGTERM it stops the service, which finishes the
requests that it has accepted, and then Triton.
"""

import contextlib
import http.client
import logging
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from bertqa.manifest import BundleMismatch
from bertqa.repository import ChangeRefused, Repository
from service.observability import logging as logs
from service.runtime.child import child
from service.runtime.engine import PROJECT, LaunchError, ensure_engine, settle
from service.runtime.leftovers import Claim, remove_leftovers
from service.runtime.ports import LOOPBACK, PortError, TritonPorts, hold_port
from service.runtime.processes import restart_pauses
from service.runtime.triton_install import TritonError
from service.runtime.triton_process import EmbeddedTriton
from service.settings import Settings
from service.shutdown import DRAIN_S

if TYPE_CHECKING:
    from service.commands.serve import ServeOptions  # imported for types only: the command imports the launcher

log = logging.getLogger(logs.LAUNCHER)

FAILED, WRONG_USE = 1, 2
"""Exit codes: something failed to start; the command line is wrong."""
OPEN_FILES = 16_384
"""Open files per process of the service, if the system allows us to set the limit."""

_READY_TIMEOUT_S = 60.0
_LATE_S = 4  # from the drain until the service is killed; its clean-up takes less
_TRITON_PATIENCE_S = 3.0  # after the service has ended, nobody waits for Triton's replies


class UsageError(LaunchError):
    """The options do not work together."""


def launch(options: "ServeOptions") -> int:
    """Run until a signal ends it; returns the exit code."""
    try:
        settings = Settings.from_environment(os.environ)
        logs.configure(settings)
    except ValueError as error:
        print(f"bertqa: error: {error}", file=sys.stderr)
        return FAILED
    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.set())
    try:
        _run(options, settings, stopping)
    except UsageError as error:
        log.error("error: %s", error)
        return WRONG_USE
    except (LaunchError, TritonError, BundleMismatch, ChangeRefused) as error:
        log.error("error: %s", error)
        return FAILED
    log.info("ended")
    return 0


def _run(options: "ServeOptions", settings: Settings, stopping: threading.Event) -> None:
    with contextlib.ExitStack() as stack:
        port = _hold(stack, options.host, options.port, "--port")
        if options.triton_grpc_port:
            if options.triton_grpc_port == port:
                raise UsageError(f"--port and --triton-grpc-port: must differ; both are {port}")
            with contextlib.ExitStack() as briefly:
                _hold(briefly, LOOPBACK, options.triton_grpc_port, "--triton-grpc-port")
        if options.triton_url and not Repository(options.repository).serving():
            raise UsageError(
                f"--repository {options.repository}: has no model, and with --triton-url none is built; give the model "
                "repository of that Triton, or a copy of it"
            )
        for path in remove_leftovers():
            log.info("removed %s, left by a killed process", path)
        ensure_engine(options.repository, options.checkpoint, stopping)
        url = options.triton_url
        if not url and not stopping.is_set():
            url = _start_triton(stack, options, port, stopping)
        if url and not stopping.is_set():
            scratch = stack.enter_context(Claim.directory()).path
            _serve(options, settings, port, url, stopping, scratch)


def _hold(stack: contextlib.ExitStack, host: str, port: int, option: str) -> int:
    """Reserve a port for the service until the stack closes; returns its number."""
    try:
        held = stack.enter_context(hold_port(host, port, option))
    except PortError as error:
        raise UsageError(str(error)) from None
    return int(held.getsockname()[1])


def _start_triton(stack: contextlib.ExitStack, options: "ServeOptions", port: int, stopping: threading.Event) -> str:
    """Start the embedded server, which the stack stops; returns its gRPC address."""
    settle(Repository(options.repository))
    wanted = TritonPorts.grpc if options.triton_grpc_port is None else options.triton_grpc_port
    triton = EmbeddedTriton(
        options.repository,
        ports=TritonPorts(grpc=wanted),
        avoid_ports=(port,),
        log_dir=options.log_dir,
        report=log.info,
    )
    stack.callback(triton.stop, _TRITON_PATIENCE_S)
    triton.start(stopping)
    return triton.url


def _serve(
    options: "ServeOptions", settings: Settings, port: int, triton_url: str, stopping: threading.Event, scratch: Path
) -> None:
    """Run the REST service until `stopping` is set, restarting it when it dies; `scratch` is an empty directory.

    Raises:
        LaunchError: the first start failed.
    """
    _allow_open_files()
    command = _uvicorn(options, port)
    environment = os.environ | {
        "BERTQA_TRITON_URL": triton_url,
        "BERTQA_REPOSITORY": str(options.repository.resolve()),
    }
    if not options.triton_url:  # our own Triton has no TLS, so ignore those settings
        environment |= dict.fromkeys(("BERTQA_TRITON_TLS_CA", "BERTQA_TRITON_TLS_CERT", "BERTQA_TRITON_TLS_KEY"), "")
    end_s = settings.shutdown_delay_s + DRAIN_S + _LATE_S
    for start, pause in enumerate(restart_pauses()):
        if stopping.wait(pause):
            return
        if options.workers > 1:  # workers share metrics in files, which must be new for each start
            environment["PROMETHEUS_MULTIPROC_DIR"] = str(scratch / str(start))
            (scratch / str(start)).mkdir()
        began, ready = time.monotonic(), False
        with child(command, environment, logs.OUTPUT, end_s=end_s) as process:
            while process.poll() is None and not stopping.wait(0.5 if ready else 0.1):
                if not ready and _is_ready(options.host, port):
                    ready = True
                    log.info("ready at http://%s:%d", _reachable(options.host), port)
                elif not start and not ready and time.monotonic() - began > _READY_TIMEOUT_S:
                    raise LaunchError(f"the service was not ready after {_READY_TIMEOUT_S:.0f} s")
        if stopping.is_set():
            return
        if not start and not ready:
            raise LaunchError(f"the service ended with exit code {process.returncode}; see its output above")
        log.warning("the service ended with exit code %s; restarting", process.returncode)


def _uvicorn(options: "ServeOptions", port: int) -> list[str]:
    command = [sys.executable, "-m", "uvicorn", "service.app:create_app", "--factory", f"--app-dir={PROJECT}"]
    command += [f"--host={options.host}", f"--port={port}", f"--workers={options.workers}"]
    command += ["--loop=uvloop", "--http=service.runtime.http_protocol:BoundedProtocol"]
    command += [f"--timeout-graceful-shutdown={DRAIN_S}"]
    return [*command, "--no-access-log", "--no-server-header", "--log-level=warning"]


def _allow_open_files() -> None:
    # The usual limit of 1024 open files is below the allowed number of connections.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < OPEN_FILES <= hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, hard))


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
    """Return the host for a URL of a service that listens on ``host``, as seen from this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host
