"""Start the servers of a load test: Triton, replicas of the service, and HAProxy, each with the product's own command.

Also measures their cost (CPU time, memory, Triton's statistics) and describes the machine.
"""

import contextlib
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from bertqa.hardware import cpu_features
from bertqa.manifest import MODEL_NAME
from bertqa.repository import Repository

PROJECT = Path(__file__).resolve().parent.parent
HAPROXY_CFG = PROJECT / "deploy" / "haproxy.cfg"
START_S = 120.0
"""Longest start of a server."""
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever http_proxy says


class ServerFailed(RuntimeError):
    """A server is missing or did not start; the message says which and where its log is."""


@dataclass
class Server:
    """A running server."""

    role: str
    url: str
    process: "subprocess.Popen[bytes]"
    ports: Mapping[str, int] = field(default_factory=dict)

    def tree(self) -> list[psutil.Process]:
        """The process and its descendants; empty if it has ended."""
        with contextlib.suppress(psutil.NoSuchProcess):
            own = psutil.Process(self.process.pid)
            return [own, *own.children(recursive=True)]
        return []


@dataclass
class Stack:
    """All servers of a measurement, and the address for clients."""

    url: str
    tritons: list[Server]
    replicas: list[Server]
    balancer: Server | None

    @property
    def servers(self) -> list[Server]:
        """All of them."""
        return [*self.tritons, *self.replicas, *([self.balancer] if self.balancer else [])]

    def cpu_seconds(self) -> dict[str, float]:
        """User and system time of the servers so far, by role."""
        found: dict[str, float] = {}
        for server in self.servers:
            for process in server.tree():
                with contextlib.suppress(psutil.NoSuchProcess):
                    times = process.cpu_times()
                    found[server.role] = found.get(server.role, 0.0) + times.user + times.system
        return found

    def memory_mib(self) -> dict[str, float]:
        """Memory of the servers by role; shared pages count once (proportional set size)."""
        found: dict[str, float] = {}
        for server in self.servers:
            for process in server.tree():
                with contextlib.suppress(psutil.NoSuchProcess):
                    found[server.role] = found.get(server.role, 0.0) + process.memory_full_info().pss / 2**20
        return found

    def engine_seconds(self) -> dict[str, float]:
        """Triton's statistics of the engine calls so far: number, and seconds in the queue and computing."""
        found = {"calls": 0.0, "queue_s": 0.0, "compute_s": 0.0}
        for server in self.tritons:
            reply = get_json(f"http://127.0.0.1:{server.ports['http']}/v2/models/{MODEL_NAME}/stats")
            for version in reply["model_stats"]:
                stats = version["inference_stats"]
                found["calls"] += stats["success"]["count"]
                found["queue_s"] += stats["queue"]["ns"] / 1e9
                computed = ("compute_input", "compute_infer", "compute_output")
                found["compute_s"] += sum(stats[part]["ns"] for part in computed) / 1e9
        return found


def get_json(url: str) -> Any:
    """Read the JSON at an address."""
    with _DIRECT.open(url, timeout=10) as response:
        return json.loads(response.read())


@contextlib.contextmanager
def tritons(repository: Path, count: int, logs: Path) -> Iterator[list[Server]]:
    """Start Triton servers that each load the repository, and wait until they are warm."""
    with contextlib.ExitStack() as stack:
        started = []
        for number in range(count):
            ports = dict(zip(("grpc", "metrics", "http"), free_ports(3), strict=True))
            command = [sys.executable, "-m", "service.runtime.triton", "--repository", str(repository)]
            for name, port in ports.items():
                command += [f"--{name}-port", str(port)]
            process = stack.enter_context(_running(command, logs / f"triton-{number + 1}.log"))
            started.append(Server("triton", f"127.0.0.1:{ports['grpc']}", process, ports))
        for server in started:
            _wait_until_ready(server, f"http://127.0.0.1:{server.ports['http']}/v2/models/{MODEL_NAME}/ready", logs)
        yield started


@contextlib.contextmanager
def replicas(engines: Sequence[Server], repository: Path, count: int, logs: Path) -> Iterator[list[Server]]:
    """Start replicas of the service and spread them over the Triton servers in turn."""
    with contextlib.ExitStack() as stack:
        started = []
        for number, port in enumerate(free_ports(count)):
            command = [sys.executable, "-m", "service", "--port", str(port), "--repository", str(repository)]
            command += ["--triton-url", engines[number % len(engines)].url]
            process = stack.enter_context(_running(command, logs / f"service-{number + 1}.log"))
            started.append(Server("service", f"http://127.0.0.1:{port}", process))
        for server in started:
            _wait_until_ready(server, f"{server.url}/health/ready", logs)
        yield started


@contextlib.contextmanager
def balancer(services: Sequence[Server], logs: Path) -> Iterator[Server]:
    """Start HAProxy in front of replicas, with the configuration of the stack except for the addresses."""
    program = shutil.which("haproxy", path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin"]))
    if not program:
        raise ServerFailed("haproxy: not found; apt-get install haproxy, or measure one replica with --balancer none")
    public, operation = free_ports(2)
    addresses = [server.url.removeprefix("http://") for server in services]
    path = logs / "haproxy.cfg"
    path.write_text(haproxy_config(HAPROXY_CFG.read_text(), public, operation, addresses))
    with _running([program, "-f", str(path)], logs / "haproxy.log") as process:
        server = Server("haproxy", f"http://127.0.0.1:{public}", process)
        _wait_until_ready(server, f"{server.url}/health/ready", logs)
        while _servers_up(operation) < len(services):
            time.sleep(0.1)
        yield server


def haproxy_config(text: str, public: int, operation: int, addresses: Sequence[str]) -> str:
    """Rewrite the configuration of the stack for fixed addresses on this machine.

    Args:
        text: of deploy/haproxy.cfg.
        public: port for clients.
        operation: port for health and metrics.
        addresses: host:port of the replicas.

    Raises:
        ValueError: the text lacks a line that must be replaced.
    """
    servers = "\n".join(f"    server service-{n + 1} {address}" for n, address in enumerate(addresses))
    for pattern, instead in (
        (r"^    bind :8000$", f"    bind 127.0.0.1:{public}"),
        (r"^    bind :8405$", f"    bind 127.0.0.1:{operation}"),
        (r"^resolvers dns\n(?:    .*\n)+", ""),
        (r"^    server-template .*$", servers),
    ):
        text, found = re.subn(pattern, instead, text, flags=re.MULTILINE)
        if found != 1:
            raise ValueError(f"haproxy.cfg: {pattern!r} was found {found} times, not once")
    return text


def _servers_up(operation: int) -> int:
    with _DIRECT.open(f"http://127.0.0.1:{operation}/metrics?scope=backend", timeout=10) as response:
        found = re.search(r'^haproxy_backend_active_servers\{proxy="service"\} (\S+)$', response.read().decode(), re.M)
    return int(float(found[1])) if found else 0


@contextlib.contextmanager
def stack(
    repository: Path, logs: Path, *, replica_count: int, triton_count: int = 1, balanced: bool
) -> Iterator[Stack]:
    """Start all servers of a measurement and stop them after it.

    Args:
        repository: Triton's.
        logs: directory for what they write.
        replica_count: replicas of the service.
        triton_count: Triton servers, each with all engines of the repository.
        balanced: put HAProxy in front of the replicas; without it there must be one replica.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as started:
        engines = started.enter_context(tritons(repository, triton_count, logs))
        services = started.enter_context(replicas(engines, repository, replica_count, logs))
        front = started.enter_context(balancer(services, logs)) if balanced else None
        yield Stack((front or services[0]).url, engines, services, front)


@contextlib.contextmanager
def _running(command: Sequence[str], log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    with log.open("ab") as output:
        process = subprocess.Popen(command, cwd=PROJECT, stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(server: Server, url: str, logs: Path) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until and server.process.poll() is None:
        with contextlib.suppress(OSError), _DIRECT.open(url, timeout=5):
            return
        time.sleep(0.1)
    raise ServerFailed(f"{server.role} at {server.url} did not start; its log is in {logs}")


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [int(probe.getsockname()[1]) for probe in probes]


def tree_memory(pid: int) -> int:
    """Bytes of a process and its descendants: proportional set size, where a shared page counts once."""
    process = psutil.Process(pid)
    return sum(int(each.memory_full_info().pss) for each in [process, *process.children(recursive=True)])


class Product:
    """The product as `bertqa serve` starts it: launcher, service and Triton, on free ports."""

    def __init__(self, repository: Path, **environment: str) -> None:
        self.repository = repository
        self._environment = {"BERTQA_DEADLINE_S": "60", **environment}
        self.bundle = Repository(repository).open()
        self._lines: list[str] = []

    def __enter__(self) -> "Product":
        self._process = subprocess.Popen(
            [sys.executable, "-m", "service", "--port=0", "--triton-grpc-port=0", f"--repository={self.repository}"],
            cwd=PROJECT, stderr=subprocess.PIPE, text=True, env=os.environ | self._environment,
        )  # fmt: skip
        try:
            address = urlsplit(self._find(r"ready at (http://\S+)"))
            self.host, self.port = str(address.hostname), int(address.port or 80)
            self.triton = re.findall(r"ready after .* \(gRPC (\S+)\)", "".join(self._lines))[-1]
            children = psutil.Process(self._process.pid).children(recursive=True)
            self.service = next(child for child in children if "uvicorn" in child.cmdline())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(60)

    def _find(self, pattern: str) -> str:
        """Wait for a line; a thread then copies the rest to standard error."""
        stream = self._process.stderr
        assert stream
        for line in stream:
            self._lines.append(line)
            if match := re.search(pattern, line):
                threading.Thread(target=sys.stderr.writelines, args=(stream,), daemon=True).start()
                return match[1]
        raise RuntimeError("".join([*self._lines, f"the service ended with exit code {self._process.wait()}"]))

    @property
    def cpu_s(self) -> float:
        """User and system time of the service's process so far."""
        times = self.service.cpu_times()
        return float(times.user + times.system)


def ensure_engine(repository: Path, checkpoint: Path) -> None:
    """Build an engine if the repository has none, by starting the service once."""
    if not Repository(repository).serving():
        command = [sys.executable, "-m", "service", "--port", "0", "--triton-grpc-port", "0"]
        command += ["--repository", str(repository), "--checkpoint", str(checkpoint)]
        process = subprocess.Popen(command, cwd=PROJECT, stderr=subprocess.PIPE, text=True)
        assert process.stderr
        for line in process.stderr:
            sys.stderr.write(line)
            if "ready at http://" in line:
                process.terminate()
        if process.wait():
            raise ServerFailed(f"no engine could be built into {repository}; the output is above")


def copy_repository(source: Path, destination: Path, instances: int) -> Path:
    """Copy a model repository and configure the number of engine instances in the copy."""
    shutil.copytree(source, destination, dirs_exist_ok=True)
    Repository(destination).configure(MODEL_NAME, instances=instances)
    return destination


def machine() -> dict[str, Any]:
    """Describe the machine."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    facts = {
        name: (re.findall(rf"^{name}\s*: (.*)$", text, re.MULTILINE) or [""])[0]
        for name in ("model name", "cpu family", "model")
    }
    return {
        "cpu": f"{facts['model name'] or platform.processor()} (family {facts['cpu family']}, model {facts['model']})",
        "cpu_features": list(cpu_features()),
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
    }
