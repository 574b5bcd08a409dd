"""Run a Triton server on this machine: start it, watch it, restart it and stop it."""

import contextlib
import logging
import os
import shlex
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from pathlib import Path
from types import TracebackType

from service.observability import logging as logs
from service.runtime import triton_log
from service.runtime.leftovers import Claim, remove_leftovers
from service.runtime.ports import LOOPBACK, PortError, TritonPorts
from service.runtime.private_memory import UMASK, private_memory
from service.runtime.processes import die_with_parent, end_session, restart_pauses
from service.runtime.triton_install import TritonError, TritonInstallation, find_triton
from service.runtime.triton_log import Death
from service.runtime.triton_state import EngineProcesses, TritonState, failures, listed, models_of

READY_TIMEOUT_S = 300.0
"""Default timeout of a start: loading, and warming up every bucket on a slow machine."""
EXIT_TIMEOUT_S = 5
"""Seconds that Triton gives to running inferences when it shuts down."""

FLAGS = (
    "--model-control-mode=poll",  # the files of the repository decide what is loaded; no API is needed
    "--repository-poll-secs=1",
    "--exit-on-error=false",  # a model that fails to load must not stop the others,
    "--strict-readiness=false",  # nor make a server unready that still has the previous version
    "--disable-auto-complete-config",  # missing fields of config.pbtxt are errors, not guesses
    f"--exit-timeout-secs={EXIT_TIMEOUT_S}",
    # A client finds new replicas behind a name when a connection ends: here every minute.
    "--grpc-max-connection-age=60000",
    "--grpc-max-connection-age-grace=30000",
)
"""Options of every Triton, in addition to addresses and paths."""
RESTRICTED = tuple(
    f"--{option}=shared-memory,trace,logging:no:body=none"
    for option in ("grpc-restricted-protocol", "http-restricted-api")
)
"""Closes APIs that nobody may use; polling already rejects requests to load or unload a model.

Triton opens these APIs to requests with the header ``no:body``. No request can have it: in HTTP/1 the name of a header
ends at its colon, and gRPC rejects the name. So no secret appears on the command line, which every user of the machine
can read.
"""

_PORT_ATTEMPTS = 5

log = logging.getLogger("bertqa.triton")
lines_log = logging.getLogger(logs.TRITON)


class EmbeddedTriton:
    """One Triton server, by default on the loopback interface, kept alive from `start` to `stop`.

    As a context manager it starts on entry and stops on exit. One thread starts and restarts the server. The server and
    its stubs end with this process, even if it is killed.
    """

    def __init__(
        self,
        repository: Path,
        *,
        host: str = LOOPBACK,
        ports: TritonPorts | None = None,
        avoid_ports: Collection[int] = (),
        log_dir: Path | None = Path("logs"),
        ready_timeout_s: float = READY_TIMEOUT_S,
        report: Callable[[str], None] = print,
    ) -> None:
        """Set what to serve.

        Args:
            repository: Triton model repository; Triton sees changes within about a second.
            host: IPv4 address to listen on; 0.0.0.0 for all.
            ports: wanted ports.
            avoid_ports: ports reserved for other servers, even if free now.
            log_dir: directory for ``triton-<gRPC port>.log``; None: standard error.
            ready_timeout_s: timeout until all models are ready, including warm-up.
            report: called with each line for the user; default: print it.
        """
        self._repository = self._served = repository
        self._host = host
        self._wanted = ports or TritonPorts()
        self._avoid_ports = avoid_ports
        self._log_dir = log_dir
        self._ready_timeout_s = ready_timeout_s
        self._report = report
        self._stopping = threading.Event()
        self._first = threading.Event()  # set when the first start has succeeded or failed
        self._failure: TritonError | None = None
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._patience_s = EXIT_TIMEOUT_S + 5.0
        self._cache: Claim | None = None
        self._shared_memory: Claim | None = None
        self._tail: deque[str] = deque(maxlen=200)
        self.ports = self._wanted
        """The ports in use; set by `start`."""

    @property
    def _reachable(self) -> str:
        return LOOPBACK if self._host == "0.0.0.0" else self._host

    @property
    def url(self) -> str:
        """The gRPC address host:port."""
        return f"{self._reachable}:{self.ports.grpc}"

    @property
    def log_file(self) -> Path:
        """File with the output of the server."""
        return self._log_dir / f"triton-{self.ports.grpc}.log" if self._log_dir else Path("/dev/stderr")

    @property
    def pid(self) -> int | None:
        """Process id of the running server; None during a restart."""
        process = self._process
        return process.pid if process and process.poll() is None else None

    def __enter__(self) -> "EmbeddedTriton":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, stopping: threading.Event | None = None) -> None:
        """Start the server and wait until every model is loaded and warmed up.

        Args:
            stopping: if set, e.g. by a signal handler, the wait ends and nothing is left running.

        Raises:
            TritonError: the start failed; nothing is left running.
        """
        models_of(self._repository)
        try:
            installation = self._prepare()
            self._thread = threading.Thread(target=self._supervise, args=(installation,), name="triton", daemon=True)
            self._thread.start()
            while not self._first.wait(0.1):
                if stopping and stopping.is_set():
                    self.stop()
        except BaseException:
            self.stop()
            raise
        if self._failure:
            self.stop()
            raise self._failure

    def stop(self, patience_s: float | None = None) -> None:
        """Stop the server with SIGTERM, or by force after a timeout; safe to call again.

        Args:
            patience_s: seconds before force; default: more than Triton gives to running inferences.
        """
        if patience_s is not None:
            self._patience_s = patience_s
        self._stopping.set()
        if self._thread:
            self._thread.join()
        for claim in (self._cache, self._shared_memory):
            if claim:
                claim.remove()

    def _prepare(self) -> TritonInstallation:
        """Find the server, create its files and choose its ports."""
        remove_leftovers()
        try:
            self._cache, self._shared_memory = Claim.directory(), Claim.shared_memory()
        except OSError as error:
            raise TritonError(f"cannot create temporary files: {error}") from None
        installation = find_triton(self._cache.path)
        self._served = self._repository.resolve()
        if shlex.quote(str(self._served)) != str(self._served):
            # The Python backend starts its stub by an unquoted shell command, which a space would break.
            self._served = self._cache.path / "model_repository"
            self._served.symlink_to(self._repository.resolve())
        try:
            if self._log_dir:
                self._log_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TritonError(
                f"{self._log_dir}: cannot create the log directory ({error.strerror}); choose another"
            ) from None
        self._choose_ports()
        if self._log_dir:
            self.log_file.write_bytes(b"")
        return installation

    def _choose_ports(self) -> None:
        try:
            self.ports = self._wanted.free(self._avoid_ports, host=self._host)
        except PortError as error:
            raise TritonError(str(error)) from None
        for name in ("grpc", "metrics", "http"):
            wanted, found = getattr(self._wanted, name), getattr(self.ports, name)
            if wanted not in (0, found):
                self._say(f"{name} port {wanted} is taken, using {found}")

    def _say(self, line: str) -> None:
        self._report(f"triton: {line}")

    # Everything below runs in the supervising thread, because the kernel's parent-death signal is bound to that thread.

    def _supervise(self, installation: TritonInstallation) -> None:
        death: Death | None = None
        try:
            for start, pause in enumerate(restart_pauses()):
                if death and self._first.is_set():
                    self._say(f"{death.reason}; restarting in {pause:.1f} s")
                if self._stopping.wait(pause):
                    return
                death = self._live_once(installation)
                if self._stopping.is_set():
                    return
                if not self._first.is_set():
                    if not death.port_taken or start == _PORT_ATTEMPTS:
                        self._failure = TritonError(death.reason)
                        return
                    self._choose_ports()  # another process took a port
        except Exception as error:  # a bug here must not block `start` forever
            log.exception("supervision of Triton failed")
            self._failure = TritonError(f"supervision of Triton failed: {error!r}")
        finally:
            self._first.set()

    def _live_once(self, installation: TritonInstallation) -> Death:
        """Run the server until it ends."""
        self._tail.clear()
        began = time.monotonic()
        try:
            process = self._process = self._spawn(installation)
        except (OSError, subprocess.SubprocessError) as error:
            return Death(f"{installation.binary}: cannot run ({error})")
        reader = threading.Thread(target=self._read_log, args=(process,), name="triton-log", daemon=True)
        reader.start()
        try:
            models = listed(models_of(self._repository))
            state = TritonState(self._reachable, self.ports.http)
            ready, said, engines, hangs = False, began, EngineProcesses(process.pid), False
            while process.poll() is None and not self._stopping.is_set():
                now = time.monotonic()
                if not ready and (index := state.index()) is not None:
                    for failure in failures(models_of(self._repository), index, list(self._tail)):
                        if not self._first.is_set():
                            return Death(f"{failure}; see {self.log_file}")
                        self._say(failure)  # it was ready before: let the other models answer
                    ready = True
                    self._say(f"{models} ready after {now - began:.1f} s (gRPC {self.url})")
                    self._first.set()
                elif not ready and now - began > self._ready_timeout_s:
                    return Death(f"{models} not ready after {now - began:.0f} s; see {self.log_file}")
                elif not ready and now - said > 5:
                    said = now
                    self._say(f"{models} loading, {now - began:.0f} s so far")
                elif ready and engines.one_is_missing(state.engines):
                    # Triton 2.51 continues without it, reports ready, and fails every request.
                    hangs = True
                    return Death(f"an engine's process died; see {self.log_file}")
                self._stopping.wait(0.5 if ready else 0.1)
        finally:
            end_session(process, 0 if hangs else self._patience_s)
            reader.join(5)
            if self._shared_memory:
                self._shared_memory.clear()  # a killed server leaves its shared memory behind
            self._process = None
        return triton_log.death(process.returncode, list(self._tail), self.log_file)

    def _spawn(self, installation: TritonInstallation) -> "subprocess.Popen[bytes]":
        command = [
            str(installation.binary),
            f"--model-repository={self._served}",
            *FLAGS,
            *(f"--{service}-address={self._host}" for service in ("http", "grpc", "metrics")),
            f"--http-port={self.ports.http}",
            f"--grpc-port={self.ports.grpc}",
            f"--metrics-port={self.ports.metrics}",
            *RESTRICTED,
        ]
        if self._shared_memory:  # our own prefix, because servers on a machine must not share memory
            command.append(f"--backend-config=python,shm-region-prefix-name={self._shared_memory.path.name}_")
        if installation.backends:
            command.append(f"--backend-directory={installation.backends}")
        die, hide = die_with_parent(signal.SIGKILL), private_memory()

        def prepare() -> None:
            die()
            hide()

        return subprocess.Popen(
            command,
            env={**os.environ, **installation.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            umask=UMASK,
            start_new_session=True,  # only the launcher gets Ctrl-C; it lets the service drain first
            preexec_fn=prepare,  # noqa: PLW1509  calls nothing that takes a lock
        )

    def _read_log(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.stdout
        with contextlib.ExitStack() as stack:
            output = stack.enter_context(process.stdout)
            file = stack.enter_context(self.log_file.open("ab", buffering=0)) if self._log_dir else None
            for raw in output:
                line = raw.decode(errors="replace").rstrip()
                self._tail.append(line)
                if file:
                    with contextlib.suppress(OSError):  # if a full disk stopped the reading, Triton would block
                        file.write(raw)
                else:
                    lines_log.log(triton_log.level_of(line), "%s", line)
                if file and (problem := triton_log.problem_in(line)) and not self._stopping.is_set():
                    self._say(problem)
