"""The whole product on this machine: Triton, the services by their own launcher, and the load balancer."""

import contextlib
import dataclasses
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from http.client import HTTPMessage
from pathlib import Path
from typing import Any

from bertqa.manifest import MODEL_NAME
from bertqa.repository import Repository
from service.runtime.ports import TritonPorts, hold_port
from service.runtime.processes import living_children
from service.runtime.triton_process import EmbeddedTriton
from tests.chaos.clients import DEADLINE_S, Asked, answer_of, questions
from tests.chaos.relay import Relay, relay
from tests.chaos.report import READY_S, Row, Size
from tests.support.bundles import Faults, publish
from tests.support.paths import ROOT
from tests.support.ports import free_port, triton_ports
from tests.support.waiting import until

HOST = "127.0.0.1"
SETTLE_S = 40.0
"""Seconds for what is left of a scenario to go away: connections that are kept for a while, replaced ones."""


def ask(host: str, port: int, path: str, body: object = None, *, timeout: float = 10) -> tuple[int, HTTPMessage, Any]:
    """Status, headers and value of one request; status 0 where there is no answer."""
    connection = http.client.HTTPConnection(host, port, timeout=timeout)
    try:
        if body is None:
            connection.request("GET", path)
        else:
            connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        content = response.read()
        is_json = response.headers.get_content_type() == "application/json"
        return response.status, response.headers, json.loads(content) if is_json else content.decode()
    except (OSError, http.client.HTTPException):
        return 0, HTTPMessage(), None
    finally:
        connection.close()


class Service:
    """A replica: `bertqa serve` with the processes under it."""

    def __init__(self, directory: Path, repository: Path, triton_url: str, **settings: object) -> None:
        self._held = hold_port(HOST, 0, "--port")  # also while no replica is there
        self.port = int(self._held.getsockname()[1])
        self._directory = directory
        self._command = [sys.executable, "-m", "service", f"--port={self.port}", f"--repository={repository}"]
        self._command += [f"--triton-url={triton_url}"]
        settings = {"deadline_s": DEADLINE_S, **settings}
        self._environment = {
            name if name.isupper() else f"BERTQA_{name.upper()}": str(value) for name, value in settings.items()
        }
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        return HOST, self.port

    @property
    def process(self) -> "subprocess.Popen[bytes]":
        """The launcher's."""
        assert self._process
        return self._process

    @property
    def worker(self) -> int:
        """Process id of uvicorn."""
        (found,) = living_children(self.process.pid)
        return found

    @property
    def log(self) -> Path:
        """What the launcher and uvicorn say."""
        return self._directory / f"service-{self.port}.log"

    def start(self) -> None:
        """Start it, or start it again."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, cwd=ROOT, env={**os.environ, **self._environment}, stderr=log, stdout=log
            )

    def is_ready(self) -> bool:
        """Whether its readiness probe succeeds."""
        return ask(HOST, self.port, "/health/ready", timeout=2)[0] == 200

    def metric(self, name: str) -> float:
        """A metric's value, its labels part of the name.

        Raises:
            LookupError: there is none.
        """
        text = ask(HOST, self.port, "/metrics")[2] or ""
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        if not found:
            raise LookupError(f"{name}: not among the metrics of {self.log}")
        return float(found[1])

    def stop(self) -> int:
        """End it as an operator does, and give its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@dataclass(frozen=True, slots=True)
class Held:
    """What a service's process holds on to."""

    descriptors: int
    tasks: int

    @classmethod
    def by(cls, service: Service) -> "Held":
        """Count."""
        descriptors = len(os.listdir(f"/proc/{service.worker}/fd"))
        return cls(descriptors, int(service.metric("bertqa_asyncio_tasks")))


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What a scenario needs to be there; those with the same share it."""

    tritons: int = 1
    balanced: bool = False  # HAProxy before the services, and asked in their place
    relayed: bool = False  # `Relay` between the services and Triton
    clock: bool = False  # the wall clock of all processes can be set
    instances: int = 2
    settings: tuple[tuple[str, object], ...] = ()  # of the services; names in capitals are variables as they are


PATIENT = (("max_wait_s", DEADLINE_S),)
"""Clients that ask without pause may be more than an engine can answer within the time that a question may wait; let
all of them wait, so that what is refused is refused for the fault."""


class Product:
    """A layout that runs."""

    def __init__(self, directory: Path, layout: Layout) -> None:
        self.directory = directory
        self.layout = layout
        self.repository = Repository(directory / "model_repository")
        self.faults = Faults(directory)
        self.tritons: list[EmbeddedTriton] = []
        self.services: list[Service] = []
        self.asked: list[Asked] = []
        self.balancer_port = self._balancer_metrics = 0
        self._relay: Relay | None = None

    @property
    def relay(self) -> Relay:
        """Between the services and Triton."""
        assert self._relay
        return self._relay

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """Whom clients ask."""
        if self.layout.balanced:
            return [(HOST, self.balancer_port)]
        return [service.address for service in self.services]

    @contextlib.contextmanager
    def running(self) -> Iterator["Product"]:
        """Start everything, and end it."""
        with (self.directory / "build.log").open("w") as log, redirect_stdout(log), redirect_stderr(log):
            publish(self.repository, self.directory, 1, instances=self.layout.instances)
        self.faults.install(self.repository.directory(MODEL_NAME, 1))
        with contextlib.ExitStack() as stack:
            if self.layout.clock:
                stack.enter_context(self._movable_clock())
            stack.callback(self._stop_tritons)
            for _ in range(self.layout.tritons):
                self.tritons.append(self._triton(triton_ports()))
                self.tritons[-1].start()
            urls = ",".join(triton.url for triton in self.tritons)
            if self.layout.relayed:
                self._relay = stack.enter_context(relay((HOST, self.tritons[0].ports.grpc)))
                urls = f"{HOST}:{self._relay.port}"
            for _ in range(2):
                service = Service(self.directory, self.repository.root, urls, **dict(self.layout.settings))
                self.services.append(service)
                service.start()
                stack.callback(service.stop)
            if self.layout.balanced:
                stack.enter_context(self._balancer())
            until(self.is_ready, f"not ready; see {self.directory}")
            self.learn()
            yield self

    def _triton(self, ports: TritonPorts) -> EmbeddedTriton:
        return EmbeddedTriton(self.repository.root, ports=ports, log_dir=self.directory, report=self._say)

    def restart_triton(self, number: int) -> None:
        """End a server, and start another one in its place."""
        self.tritons[number].stop()
        self.tritons[number] = self._triton(self.tritons[number].ports)
        self.tritons[number].start()

    def _stop_tritons(self) -> None:
        for triton in self.tritons:
            triton.stop()

    def _say(self, line: str) -> None:
        with (self.directory / "triton.log").open("a") as log:
            log.write(line + "\n")

    def is_ready(self) -> bool:
        """Whether every service is, and the load balancer knows of each."""
        if not all(service.is_ready() for service in self.services):
            return False
        if not self.layout.balanced:
            return True
        text = ask(HOST, self._balancer_metrics, "/metrics?scope=backend")[2] or ""
        return f'haproxy_backend_active_servers{{proxy="service"}} {len(self.services)}\n' in text

    def circuits_are_closed(self) -> bool:
        """Whether no service leaves a Triton alone any more."""
        texts = [ask(HOST, service.port, "/metrics")[2] or "" for service in self.services]
        found = [re.findall(r"^bertqa_circuit_state{.*} (\S+)$", text, re.MULTILINE) for text in texts]
        return all(states and not any(map(float, states)) for states in found)

    def engine_answers(self) -> bool:
        """Whether every Triton itself has the model ready."""
        paths = f"/v2/models/{MODEL_NAME}/ready"
        return all(ask(HOST, triton.ports.http, paths, timeout=1)[0] == 200 for triton in self.tritons)

    def versions(self) -> set[int]:
        """Which versions answer."""
        listed = [ask(HOST, service.port, "/v1/models")[2]["models"] for service in self.services]
        return {models[0]["version"] for models in listed}

    def learn(self) -> None:
        """Note what the version that answers now, undisturbed, says to every question."""
        known = {each.body: each.truth for each in self.asked}
        self.asked = []
        for question in questions():
            found = {answer_of(ask(HOST, service.port, "/v1/answer", question)[2]) for service in self.services}
            assert len(found) == 1, f"the services disagree: {found}"
            body = json.dumps(question).encode()
            self.asked.append(Asked(body, {**known.get(body, {}), **dict(found)}))

    @contextlib.contextmanager
    def _movable_clock(self) -> Iterator[None]:
        """Let libfaketime tell the wall clock to every process that is started, but not the monotonic one."""
        # where Debian, Arch, Fedora and its own Makefile put it
        places = ("lib/*/faketime", "lib/faketime", "lib64/faketime", "local/lib/faketime")
        libraries = [found for place in places for found in Path("/usr").glob(f"{place}/libfaketimeMT.so.1")]
        assert libraries, "libfaketime is needed; see tests/install_servers.sh"
        self.set_clock(0)
        ours = {
            "LD_PRELOAD": str(libraries[0]),
            "FAKETIME_TIMESTAMP_FILE": str(self._clock),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }
        before = {name: os.environ.get(name) for name in ours}
        os.environ.update(ours)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value

    @property
    def _clock(self) -> Path:
        return self.directory / "clock"

    def set_clock(self, seconds: int) -> None:
        """Let the wall clock of every process be so many seconds ahead."""
        partial = self._clock.with_suffix(".partial")
        partial.write_text(f"{seconds:+d}s\n")
        partial.replace(self._clock)

    @contextlib.contextmanager
    def _balancer(self) -> Iterator[None]:
        """Debian's HAProxy with the configuration of the stack; the replicas by address, for there is no Docker DNS."""
        self.balancer_port = free_port(HOST)
        self._balancer_metrics = free_port(HOST)
        text = (ROOT / "deploy" / "haproxy.cfg").read_text()
        servers = "\n".join(f"    server service-{n} {HOST}:{each.port}" for n, each in enumerate(self.services, 1))
        text = re.sub(r"^ *server-template .*$", servers, text, flags=re.MULTILINE)
        text = text.replace("bind :8000", f"bind {HOST}:{self.balancer_port}")
        text = text.replace("bind :8405", f"bind {HOST}:{self._balancer_metrics}")
        (self.directory / "haproxy.cfg").write_text(text)
        program = shutil.which("haproxy", path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin")
        assert program, "HAProxy is needed; see tests/install_servers.sh"
        with (self.directory / "haproxy.log").open("ab") as log:
            balancer = subprocess.Popen([program, "-f", "haproxy.cfg"], cwd=self.directory, stdout=log, stderr=log)
        try:
            yield
        finally:
            balancer.terminate()
            balancer.wait(60)

    # What every scenario checks

    @contextlib.contextmanager
    def watched(self, row: Row, size: Size) -> Iterator[None]:
        """See that the services are ready when a scenario is over, and hold what they held before."""
        before = self._settled([Held(10**9, 10**9)] * len(self.services))
        yield
        until(self.is_ready, f"not ready again; see {self.directory}")
        after = self._settled(before)
        leaks = [
            f"{field.name} {getattr(held, field.name)} -> {getattr(now, field.name)}"
            for held, now in zip(before, after, strict=True)
            for field in dataclasses.fields(Held)
            if getattr(now, field.name) > getattr(held, field.name)
        ]
        row.leaked = ", ".join(leaks)
        if row.ready_s is not None and row.ready_s > READY_S * size.patience:
            row.problems.append(f"ready only {row.ready_s:.1f} s after the engine's return")

    def _settled(self, bound: Sequence[Held]) -> list[Held]:
        """What the services hold, once it is within a bound or time is up."""
        end = time.monotonic() + SETTLE_S
        for service, body in ((service, questions()[0]) for service in self.services for _ in range(4)):
            ask(HOST, service.port, "/v1/answer", body)  # so that every connection to Triton is there
        while True:
            held = [Held.by(service) for service in self.services]
            inside = all(
                now.descriptors <= most.descriptors and now.tasks <= most.tasks
                for now, most in zip(held, bound, strict=True)
            )
            if inside or time.monotonic() > end:
                return held
            time.sleep(0.2)

    def ready_after(self, row: Row, returned: Callable[[], object]) -> None:
        """Wait for the engine's return, then for the services; note how long those took."""
        until(returned, f"the engine has not come back; see {self.directory}", 120)
        waited = until(self.is_ready, f"not ready again; see {self.directory}")
        row.ready_s = max(row.ready_s or 0.0, waited)
