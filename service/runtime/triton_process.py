"""A Triton server on this machine: found, started, watched, restarted and ended by the process that needs it.

The server is ``tritonserver`` on PATH with its own backends, or else the one inside the ``nvidia-pytriton`` wheel. Only
files of the wheel are used: nothing of the package is imported, so none of its dependencies are needed.

``python -m service.runtime.triton_process`` runs one in the foreground, as the container does that has nothing else.
"""

import argparse
import contextlib
import ctypes
import errno
import http.client
import importlib.metadata
import itertools
import json
import logging
import math
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from service.observability import logging as logs
from service.settings import Settings

LOOPBACK = "127.0.0.1"
WHEEL = "nvidia-pytriton"
INSTALL = f"python -m pip install --no-deps --constraint constraints.txt {WHEEL}"
READY_TIMEOUT_S = 300.0
"""Default for the longest start: loading, and a warm-up of every bucket on a slow machine."""
EXIT_TIMEOUT_S = 5
"""Seconds that Triton gives the inferences in flight when it is told to end."""

FLAGS = (
    "--model-control-mode=poll",  # the repository's files say what is loaded, and no API needs to be open for it
    "--repository-poll-secs=1",
    "--exit-on-error=false",  # a model that cannot be loaded is no reason to end the others,
    "--strict-readiness=false",  # nor to take away a server that goes on with the version before
    "--disable-auto-complete-config",  # what config.pbtxt leaves out is an error, not a guess
    f"--exit-timeout-secs={EXIT_TIMEOUT_S}",
    # A client finds a new replica behind a name when one of its connections ends: here every minute.
    "--grpc-max-connection-age=60000",
    "--grpc-max-connection-age-grace=30000",
)
"""What every Triton is started with, wherever it runs, beside addresses and paths."""
CLOSED = "shared-memory,trace,logging"
"""APIs that nobody may use, over gRPC or HTTP; polling already refuses to load or unload a model by any."""

_RESTRICT = ("grpc-restricted-protocol", "http-restricted-api")
_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
_PORT_ATTEMPTS = 5
_MAX_PAUSE_S = 30.0  # between restarts
_STEADY_S = 60.0  # after so long a life, a death is a first one again
_STUBS_S = 5.0  # between two looks for new ones
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)

_STUB_STARTER = """\
#!/bin/sh
stub=$$
{{ tail --pid="$PPID" -s 0.5 -f /dev/null; kill -9 "$stub"; }} 2>/dev/null &
exec {stub} "$@"
"""

log = logging.getLogger("bertqa.triton")
lines_log = logging.getLogger(logs.TRITON)


class TritonError(RuntimeError):
    """Triton cannot be found, started, or made to load the model; the message says why and what to do."""


@dataclass(frozen=True)
class TritonPorts:
    """Ports to listen on; where one is taken, the next free one is used in its place."""

    grpc: int = 8001
    metrics: int = 8002
    http: int = 8003  # Triton's own default, 8000, is where the service listens

    def free(self, avoid: Iterable[int] = (), *, host: str = LOOPBACK) -> "TritonPorts":
        """These ports, or for each that is taken or to be avoided the next one that is not."""
        taken = set(avoid)
        found: dict[str, int] = {}
        for name in ("grpc", "metrics", "http"):
            found[name] = free_port(host, getattr(self, name), avoid=taken)
            taken.add(found[name])
        return TritonPorts(**found)


def free_port(host: str, wanted: int, *, avoid: Collection[int] = ()) -> int:
    """The wanted port if nothing listens there, else the next one up that is free; 0 takes any.

    Raises:
        TritonError: the address does not belong to this machine, or none of the 100 ports after it is free.
    """
    candidates = range(wanted, min(wanted + 100, 65536)) if wanted else itertools.repeat(0, 100)
    for port in candidates:
        if port in avoid:
            continue
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: TIME_WAIT is not "taken"
            try:
                probe.bind((host, port))
                probe.listen()
            except PermissionError:
                raise TritonError(f"port {port}: needs privileges; choose one above 1023") from None
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    continue
                raise TritonError(f"{host}: cannot listen there ({error.strerror})") from None
            found = int(probe.getsockname()[1])
            if found not in avoid:
                return found
    raise TritonError(f"no free port from {wanted} to {wanted + 99} on {host}; choose another")


@dataclass(frozen=True, slots=True)
class TritonInstallation:
    """A server binary and what it needs around it."""

    binary: Path
    backends: Path | None  # None: the binary knows its own
    environment: Mapping[str, str]  # in addition to the process's own


def find_triton(cache: Path) -> TritonInstallation:
    """Find a Triton server: ``tritonserver`` on PATH, else the one in the ``nvidia-pytriton`` wheel.

    Args:
        cache: directory in which a backend directory for the wheel's server is put together.

    Raises:
        TritonError: there is none, or the wheel has no Python backend for this Python.
    """
    on_path = shutil.which("tritonserver")
    if on_path:
        # Its Python backend takes the packages of the first python3 on PATH: let that be this environment's.
        path = os.pathsep.join([str(Path(sys.prefix) / "bin"), os.environ.get("PATH", "")])
        return TritonInstallation(Path(on_path), None, {"PATH": path})
    try:
        root = Path(str(importlib.metadata.distribution(WHEEL).locate_file("pytriton/tritonserver")))
    except importlib.metadata.PackageNotFoundError:
        root = Path("/nonexistent")
    binary = root / "bin" / "tritonserver"
    if not binary.is_file():
        raise TritonError(
            f"no Triton server: neither tritonserver on PATH nor the {WHEEL} wheel in {sys.prefix}; "
            f"run `{INSTALL}`, or give the address of a running one with --triton-url"
        )
    stub = root / "python_backend_stubs" / _PYTHON / "triton_python_backend_stub"
    if not stub.is_file():
        there = sorted((path.name for path in stub.parent.parent.iterdir()), key=lambda name: int(name.split(".")[1]))
        raise TritonError(
            f"the {WHEEL} wheel runs models with Python {', '.join(there)}, this is Python {_PYTHON}; make the virtual "
            "environment with one of those"
        )
    python_backend = root / "backends" / "python"
    backends = cache / "backends"
    _link(backends / "python", [*python_backend.glob("*.so"), *python_backend.glob("*.py")])
    # While it starts, the stub waits for its server without end, even for one that is gone.
    starter = backends / "python" / stub.name
    starter.write_text(_STUB_STARTER.format(stub=shlex.quote(str(stub.resolve()))))
    starter.chmod(0o755)
    if not os.access(starter, os.X_OK):  # a directory for temporary files may be mounted noexec
        starter.unlink()
        starter.symlink_to(stub.resolve())
    _link(cache / "lib", [_libpython()])
    libraries = [cache / "lib", root.parent.parent / "nvidia_pytriton.libs", os.environ.get("LD_LIBRARY_PATH", "")]
    environment = {
        "LD_LIBRARY_PATH": os.pathsep.join(str(path) for path in libraries if str(path)),
        # The stub embeds Python and takes its home and packages from the python3 that comes first on PATH, virtual
        # environments included; it ignores PYTHONHOME and PYTHONPATH.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "PYTHONUNBUFFERED": "1",
    }
    return TritonInstallation(binary, backends, environment)


def _libpython() -> Path:
    """The shared library that the stub is linked with, of the running Python."""
    name = f"libpython{_PYTHON}.so.1.0"
    directories = [sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("LIBPL"), f"{sys.base_prefix}/lib"]
    multiarch = sysconfig.get_config_var("MULTIARCH")
    directories += [f"{lib}/{multiarch}" for lib in ("/usr/lib", "/lib") if multiarch]
    for directory in filter(None, directories):
        if (Path(directory) / name).is_file():
            return Path(directory) / name
    raise TritonError(
        f"{name} is missing, and Triton runs Python models with it; Debian and Ubuntu have it in libpython{_PYTHON} "
        f"(`apt install libpython{_PYTHON}`), pyenv builds it with PYTHON_CONFIGURE_OPTS=--enable-shared"
    )


def _link(directory: Path, targets: Sequence[Path]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for target in targets:
        (directory / target.name).symlink_to(target.resolve())


class EmbeddedTriton:
    """One Triton server, on the loopback interface unless told otherwise, kept alive from `start` to `stop`.

    As a context manager it starts on entry and stops on exit. One thread starts and restarts the server; the server
    ends with this process however that ends, and its stubs end with it.
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
        """Say what to serve.

        Args:
            repository: Triton model repository; what changes in it is noticed within about a second.
            host: IPv4 address to listen on; 0.0.0.0 is all of this machine's.
            ports: wanted ports.
            avoid_ports: ports that are meant for others, though nothing listens there yet.
            log_dir: the server writes ``triton-<gRPC port>.log`` there; without one, to standard error.
            ready_timeout_s: longest wait for all models to be ready, warm-up included.
            report: takes each line meant for a person, by default for the console.
        """
        self._repository = self._served = repository
        self._host = host
        self._wanted = ports or TritonPorts()
        self._avoid_ports = avoid_ports
        self._log_dir = log_dir
        self._ready_timeout_s = ready_timeout_s
        self._report = report
        self._stopping = threading.Event()
        self._first = threading.Event()  # the first start has succeeded or failed
        self._failure: TritonError | None = None
        # Unique, so that no two servers of one machine share memory.
        self._shared_memory = f"bertqa_{os.getpid()}_{id(self):x}_"
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._cache: tempfile.TemporaryDirectory[str] | None = None
        self._tail: deque[str] = deque(maxlen=200)
        self.ports = self._wanted
        """The ports in use, known after `start`."""

    @property
    def _reachable(self) -> str:
        return LOOPBACK if self._host == "0.0.0.0" else self._host

    @property
    def url(self) -> str:
        """The gRPC address host:port."""
        return f"{self._reachable}:{self.ports.grpc}"

    @property
    def log_file(self) -> Path:
        """Where everything that the server writes can be read."""
        return self._log_dir / f"triton-{self.ports.grpc}.log" if self._log_dir else Path("/dev/stderr")

    @property
    def pid(self) -> int | None:
        """Process id of the running server, None between two lives."""
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
        """Start the server and return when every model is ready, warmed up.

        Args:
            stopping: set from elsewhere, e.g. by a signal handler, it ends the wait; then nothing is left running.

        Raises:
            TritonError: it cannot be; nothing is left running.
        """
        models_of(self._repository)
        self._cache = tempfile.TemporaryDirectory(prefix="bertqa-triton-")
        try:
            installation = find_triton(Path(self._cache.name))
            self._served = self._repository.resolve()
            if shlex.quote(str(self._served)) != str(self._served):
                # The Python backend starts its stub by a shell line without quotes, which a space would break.
                self._served = Path(self._cache.name) / "model_repository"
                self._served.symlink_to(self._repository.resolve())
            try:
                if self._log_dir:
                    self._log_dir.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise TritonError(
                    f"{self._log_dir}: no directory for logs ({error.strerror}); choose another"
                ) from None
            self._choose_ports()
            if self._log_dir:
                self.log_file.write_bytes(b"")
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

    def stop(self) -> None:
        """End the server: politely at first, by force if it takes too long; safe to call again."""
        self._stopping.set()
        if self._thread:
            self._thread.join()
        if self._cache:
            self._cache.cleanup()

    def _choose_ports(self) -> None:
        self.ports = self._wanted.free(self._avoid_ports, host=self._host)
        for name in ("grpc", "metrics", "http"):
            wanted, found = getattr(self._wanted, name), getattr(self.ports, name)
            if wanted not in (0, found):
                self._say(f"{name} port {wanted} is taken, using {found}")

    def _say(self, line: str) -> None:
        self._report(f"triton: {line}")

    # Everything below runs in the supervising thread: the kernel's death signal belongs to the thread that forked.

    def _supervise(self, installation: TritonInstallation) -> None:
        death: _Death | None = None
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
                    self._choose_ports()  # another process was faster
        except Exception as error:  # a bug here must not leave `start` waiting
            log.exception("supervision of Triton failed")
            self._failure = TritonError(f"supervision of Triton failed: {error!r}")
        finally:
            self._first.set()

    def _live_once(self, installation: TritonInstallation) -> "_Death":
        """Run the server from its start to its end."""
        self._tail.clear()
        began = time.monotonic()
        try:
            process = self._process = self._spawn(installation)
        except (OSError, subprocess.SubprocessError) as error:
            return _Death(f"{installation.binary}: cannot be run ({error})")
        reader = threading.Thread(target=self._read_log, args=(process,), name="triton-log", daemon=True)
        reader.start()
        try:
            models = _listed(models_of(self._repository))
            ready, said, patience_s, stubs = False, began, EXIT_TIMEOUT_S + 5.0, _Stubs(process.pid)
            while process.poll() is None and not self._stopping.is_set():
                now = time.monotonic()
                if not ready and (index := self._index()) is not None:
                    if failures := self._failures(index):
                        if not self._first.is_set():
                            return _Death(f"{failures[0]}; see {self.log_file}")
                        for failure in failures:  # it was ready once: let the other models answer
                            self._say(failure)
                    ready = True
                    self._say(f"{models} ready after {now - began:.1f} s (gRPC {self.url})")
                    self._first.set()
                elif not ready and now - began > self._ready_timeout_s:
                    return _Death(f"{models} not ready after {now - began:.0f} s; see {self.log_file}")
                elif not ready and now - said > 5:
                    said = now
                    self._say(f"{models} loading, {now - began:.0f} s so far")
                elif ready and stubs.one_is_missing(self._engines):
                    # Triton 2.51 goes on without it, ready by its own account, and fails every request.
                    patience_s = 0
                    return _Death(f"an engine's process died; see {self.log_file}")
                self._stopping.wait(0.5 if ready else 0.1)
        finally:
            end_session(process, patience_s)
            reader.join(5)
            for left in Path("/dev/shm").glob(f"{self._shared_memory}*"):  # a killed server does not tidy up
                left.unlink(missing_ok=True)
            self._process = None
        return self._death(process.returncode)

    def _spawn(self, installation: TritonInstallation) -> "subprocess.Popen[bytes]":
        command = [
            str(installation.binary),
            f"--model-repository={self._served}",
            *FLAGS,
            *(f"--{service}-address={self._host}" for service in ("http", "grpc", "metrics")),
            f"--http-port={self.ports.http}",
            f"--grpc-port={self.ports.grpc}",
            f"--metrics-port={self.ports.metrics}",
            # With a key that is drawn here and told nobody.
            *(f"--{flag}={CLOSED}:bertqa-key={secrets.token_urlsafe(32)}" for flag in _RESTRICT),
            f"--backend-config=python,shm-region-prefix-name={self._shared_memory}",
        ]
        if installation.backends:
            command.append(f"--backend-directory={installation.backends}")
        return subprocess.Popen(
            command,
            env={**os.environ, **installation.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the launcher, which lets the service drain first
            preexec_fn=die_with_parent(signal.SIGKILL),  # noqa: PLW1509  calls nothing that takes a lock
        )

    def _read_log(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.stdout
        with contextlib.ExitStack() as stack:
            output = stack.enter_context(process.stdout)
            file = stack.enter_context(self.log_file.open("ab", buffering=0)) if self._log_dir else None
            for raw in output:
                line = raw.decode(errors="replace").rstrip()
                self._tail.append(line)
                problem = _PROBLEM.match(line)
                if file:
                    with contextlib.suppress(OSError):  # a full disk must not stop the reading, or Triton would wait
                        file.write(raw)
                else:
                    lines_log.log(_LEVELS[problem["level"]] if problem else logging.INFO, "%s", line)
                if file and problem and not _HARMLESS.search(line) and not self._stopping.is_set():
                    self._say(_plain(problem["text"]))

    def _index(self) -> list[dict[str, str]] | None:
        """Every version that the server knows, with its state; None while it starts, for it answers when that is done.

        Each has ``name``, ``version``, ``state`` (READY, LOADING, UNLOADING, UNAVAILABLE) and ``reason``.
        """
        found = self._ask("POST", "/v2/repository/index")
        return found if isinstance(found, list) else None

    def _failures(self, index: list[dict[str, str]]) -> list[str]:
        """A sentence for each model of the repository that has no version ready."""
        failures = []
        for model in models_of(self._repository):
            versions = [entry for entry in index if entry["name"] == model]
            if not any(entry.get("state") == "READY" for entry in versions):
                told = [entry["reason"] for entry in versions if entry.get("reason", "unloaded") != "unloaded"]
                logged = _LOAD_FAILED.search("\n".join(self._tail))
                reason = told[0] if told else logged["reason"] if logged else "no reason given"
                failures.append(f"model {model} could not be loaded: {_plain(reason)}")
        return failures

    def _engines(self) -> int:
        """How many processes run engines, by the server's own account; 0 if it does not tell."""
        count = 0
        for entry in self._index() or ():
            if entry.get("state") == "READY":
                config = self._ask("GET", f"/v2/models/{entry['name']}/versions/{entry['version']}/config")
                if isinstance(config, dict) and config.get("backend") == "python":
                    count += sum(group["count"] for group in config["instance_group"])
        return count

    def _ask(self, method: str, path: str) -> Any:
        connection = http.client.HTTPConnection(self._reachable, self.ports.http, timeout=2)
        try:
            connection.request(method, path)
            response = connection.getresponse()
            return json.loads(response.read()) if response.status == 200 else None
        except (OSError, ValueError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    def _death(self, code: int | None) -> "_Death":
        text = "\n".join(self._tail)
        if found := _LOAD_FAILED.search(text):
            return _Death(f"a model could not be loaded: {_plain(found['reason'])}; see {self.log_file}")
        if _PORT_TAKEN.search(text):
            return _Death(f"one of {self.ports} was taken; see {self.log_file}", port_taken=True)
        if code is not None and code < 0:
            return _Death(f"the server was killed by {signal.Signals(-code).name}; see {self.log_file}")
        errors = (line for line in reversed(self._tail) if _ERROR.match(line) and not _HARMLESS.search(line))
        return _Death(
            f"the server ended with exit code {code} ({_plain(next(errors, 'no reason given'))}); see {self.log_file}"
        )


class _Stubs:
    """The processes of the Python backend, one for each engine.

    Children of the server that come and go with versions, but must never be fewer than the engines that it calls ready.
    """

    def __init__(self, server: int) -> None:
        self._server = server
        self._known: frozenset[int] = frozenset()
        self._looked = -math.inf
        self._short = False

    def one_is_missing(self, engines: Callable[[], int]) -> bool:
        """Whether there were too few at two looks in a row; looks when a known one has died, or after some seconds."""
        now = time.monotonic()
        if not self._short and now - self._looked < _STUBS_S and all(map(_is_living, self._known)):
            return False
        self._looked, self._known = now, living_children(self._server)
        short_before, self._short = self._short, len(self._known) < engines()
        return short_before and self._short


@dataclass(frozen=True, slots=True)
class _Death:
    """Why a server's life ended."""

    reason: str
    port_taken: bool = False


_PROBLEM = re.compile(r"(?P<level>[WEF])\d{4} \S+ \d+ [\w./]+:\d+\] (?P<text>.*)")
_LEVELS = {"W": logging.WARNING, "E": logging.ERROR, "F": logging.CRITICAL}
_ERROR = re.compile(r"error: |[EF]\d{4} ", re.IGNORECASE)
# Said on every machine without a GPU, or said again in the error that ends the start.
_HARMLESS = re.compile(
    r"[Uu]nable to allocate pinned|failed to allocate pinned|CudaDriverHelper has not|DCGM unable to start"
    r"|Failed to initialize NVML|Failed to create instance|failed to load"
)
_LOAD_FAILED = re.compile(
    r"(?:failed to load '[^']*' version \d+|Poll failed for model directory '[^']*'): (?P<reason>.*)"
)
_PORT_TAKEN = re.compile(r"[Aa]ddress already in use|Socket '[^']*' already in use|failed to start \w+ service")


def _plain(text: str) -> str:
    """One line of a log message, without quotes and escapes."""
    return " ".join(text.strip().strip('"').replace("\\n", "\n").split())


def models_of(repository: Path) -> list[str]:
    """Names of the models that Triton loads.

    Raises:
        TritonError: there is none with a built version; the message names the builder's command.
    """
    found = (path.parent for path in sorted(repository.glob("*/config.pbtxt")))
    models = [directory.name for directory in found if any(directory.glob("[1-9]*/"))]
    if not models:
        build = f"run `{Path(sys.executable).name} -m engine_builder --checkpoint DIR --target cpu` to build one"
        raise TritonError(f"{repository}: holds no built version; {build}")
    return models


def _listed(models: Sequence[str]) -> str:
    return f"model {models[0]} is" if len(models) == 1 else f"models {', '.join(models)} are"


def restart_pauses() -> Iterator[float]:
    """Seconds to wait before each start of a process: none, then more and more; after a long life it begins anew."""
    pause = 0.0
    while True:
        began = time.monotonic()
        yield pause
        lived = time.monotonic() - began - pause
        pause = 0.5 if not pause or lived > _STEADY_S else min(2 * pause, _MAX_PAUSE_S)


def die_with_parent(number: signal.Signals) -> Callable[[], None]:
    """A ``preexec_fn`` that lets the kernel send the child a signal when the thread that started it is gone."""
    parent = os.getpid()

    def prepare() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, int(number))
        if os.getppid() != parent:  # it went in between
            os._exit(1)

    return prepare


def living_children(pid: int) -> frozenset[int]:
    """Children of a process that have not ended."""
    found: set[int] = set()
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found.update(map(int, path.read_text().split()))
    return frozenset(filter(_is_living, found))


def _is_living(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def end_session(process: "subprocess.Popen[bytes]", timeout_s: float) -> None:
    """End a process that leads its own session: SIGTERM, SIGKILL when it takes too long, and then what it left."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # stubs that outlived it


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m service.runtime.triton_process",
        description="Run one Triton server in the foreground, restarted when it dies; its log goes to standard error.",
    )
    parser.add_argument(
        "--repository", type=Path, default=Path("model_repository"), help="with the engine (default: %(default)s)"
    )
    parser.add_argument(
        "--host", default=LOOPBACK, help="IPv4 address to listen on; 0.0.0.0 for all (default: %(default)s)"
    )
    for name in ("grpc", "metrics", "http"):
        parser.add_argument(
            f"--{name}-port",
            type=int,
            default=getattr(TritonPorts, name),
            help="or the next free one (default: %(default)s)",
        )
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    """Run until told to end; returns the process's exit code."""
    launcher_log = logging.getLogger(logs.LAUNCHER)
    try:
        logs.configure(Settings.from_environment(os.environ))
    except ValueError as error:
        print(f"bertqa: error: {error}", file=sys.stderr)
        return 1
    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.set())
    triton = EmbeddedTriton(
        args.repository,
        host=args.host,
        ports=TritonPorts(args.grpc_port, args.metrics_port, args.http_port),
        log_dir=None,
        report=launcher_log.info,
    )
    try:
        triton.start(stopping)
        stopping.wait()
    except TritonError as error:
        launcher_log.error("error: %s", error)
        return 1
    finally:
        triton.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(parse_args()))
