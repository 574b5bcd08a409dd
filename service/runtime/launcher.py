"""Start everything that answering needs and keep it alive: Triton with the engine, and the REST service in front of it.

The launcher builds the engine first if there is none. On Ctrl-C or SIGTERM it ends the service, which finishes the
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
    from service.commands.serve import ServeOptions  # the command starts the launcher, not the other way round

log = logging.getLogger(logs.LAUNCHER)

FAILED, WRONG_USE = 1, 2
"""Exit codes: something could not be started; the command has to be changed."""
OPEN_FILES = 16_384
"""Files that a process of the service may have open, where the system lets us set that."""

_READY_TIMEOUT_S = 60.0
_LATE_S = 4  # after the drain, before the service is killed: more than its clean-up takes
_TRITON_PATIENCE_S = 3.0  # once the service has ended, nobody waits for Triton's answers


class UsageError(LaunchError):
    """The options cannot work as they are."""


def launch(options: "ServeOptions") -> int:
    """Run until told to end; returns the process's exit code."""
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
                raise UsageError(f"--port and --triton-grpc-port: both are {port}")
            with contextlib.ExitStack() as briefly:
                _hold(briefly, LOOPBACK, options.triton_grpc_port, "--triton-grpc-port")
        if options.triton_url and not Repository(options.repository).serving():
            raise UsageError(
                f"--repository {options.repository}: holds no model; with --triton-url, nothing is built: name the "
                "model repository of that Triton, or a copy of it"
            )
        for path in remove_leftovers():
            log.info("removed %s, left by a process that was killed", path)
        ensure_engine(options.repository, options.checkpoint, stopping)
        url = options.triton_url
        if not url and not stopping.is_set():
            url = _start_triton(stack, options, port, stopping)
        if url and not stopping.is_set():
            scratch = stack.enter_context(Claim.directory()).path
            _serve(options, settings, port, url, stopping, scratch)


def _hold(stack: contextlib.ExitStack, host: str, port: int, option: str) -> int:
    """Keep a port for the service until the stack ends; gives its number."""
    try:
        held = stack.enter_context(hold_port(host, port, option))
    except PortError as error:
        raise UsageError(str(error)) from None
    return int(held.getsockname()[1])


def _start_triton(stack: contextlib.ExitStack, options: "ServeOptions", port: int, stopping: threading.Event) -> str:
    """Start the embedded server, which the stack ends; gives its gRPC address."""
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
    """Run the REST service, restarting it when it dies, until `stopping` is set; `scratch` is an empty directory.

    Raises:
        LaunchError: it did not start the first time.
    """
    _allow_open_files()
    command = _uvicorn(options, port)
    environment = os.environ | {
        "BERTQA_TRITON_URL": triton_url,
        "BERTQA_REPOSITORY": str(options.repository.resolve()),
    }
    if not options.triton_url:  # our own speaks no TLS, whatever another one would want
        environment |= dict.fromkeys(("BERTQA_TRITON_TLS_CA", "BERTQA_TRITON_TLS_CERT", "BERTQA_TRITON_TLS_KEY"), "")
    end_s = settings.shutdown_delay_s + DRAIN_S + _LATE_S
    for start, pause in enumerate(restart_pauses()):
        if stopping.wait(pause):
            return
        if options.workers > 1:  # they count in files, which must be new with them
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
            raise LaunchError(f"the service ended with exit code {process.returncode}; its output is above")
        log.warning("the service ended with exit code %s; restarting", process.returncode)


def _uvicorn(options: "ServeOptions", port: int) -> list[str]:
    command = [sys.executable, "-m", "uvicorn", "service.app:create_app", "--factory", f"--app-dir={PROJECT}"]
    command += [f"--host={options.host}", f"--port={port}", f"--workers={options.workers}"]
    command += ["--loop=uvloop", "--http=service.runtime.http_protocol:BoundedProtocol"]
    command += [f"--timeout-graceful-shutdown={DRAIN_S}"]
    return [*command, "--no-access-log", "--no-server-header", "--log-level=warning"]


def _allow_open_files() -> None:
    # A shell's usual limit of 1024 open files is fewer than a process may have connections.
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
    """The host part of a URL under which this machine reaches a service that listens on ``host``."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host
