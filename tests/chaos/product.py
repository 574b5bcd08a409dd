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
"""Seconds for leftovers of a scenario to disappear, such as keep-alive and replaced connections."""


def ask(host: str, port: int, path: str, body: object = None, *, timeout: float = 10) -> tuple[int, HTTPMessage, Any]:
    """Send a request; return status, headers and value, with status 0 if there is no reply."""
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
        self._held = hold_port(HOST, 0, "--port")  # also while no replica runs
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
        """Log of the launcher and uvicorn."""
        return self._directory / f"service-{self.port}.log"

    def start(self) -> None:
        """Start or restart the replica."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, cwd=ROOT, env={**os.environ, **self._environment}, stderr=log, stdout=log
            )

    def is_ready(self) -> bool:
        """Check whether the readiness probe succeeds."""
        return ask(HOST, self.port, "/health/ready", timeout=2)[0] == 200

    def metric(self, name: str) -> float:
        """Return the value of a metric; the name includes the labels.

        Raises:
            LookupError: there is no such metric.
        """
        text = ask(HOST, self.port, "/metrics")[2] or ""
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        if not found:
            raise LookupError(f"{name}: not among the metrics of {self.log}")
        return float(found[1])

    def stop(self) -> int:
        """Stop it as an operator does, and return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def release_port(self) -> None:
        """Release the port for good; nothing may be started after it."""
        self._held.close()


@dataclass(frozen=True, slots=True)
class Held:
    """Resources that a service's process holds."""

    descriptors: int
    tasks: int

    @classmethod
    def by(cls, service: Service) -> "Held":
        """Count."""
        descriptors = len(os.listdir(f"/proc/{service.worker}/fd"))
        return cls(descriptors, int(service.metric("bertqa_asyncio_tasks")))


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The set-up that a scenario needs; scenarios with the same layout share it."""

    tritons: int = 1
    balanced: bool = False  # HAProxy in front of the services; clients ask it
    relayed: bool = False  # `Relay` between the services and Triton
    clock: bool = False  # the wall clock of all processes can be set
    instances: int = 2
    settings: tuple[tuple[str, object], ...] = ()  # of the services; names in capitals are environment variables


PATIENT = (("max_wait_s", DEADLINE_S),)
"""Clients without pauses may exceed what an engine can answer within the wait limit. So all may wait, and
only the fault causes refusals."""


class Product:
    """A running layout."""

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
        """Addresses that clients ask."""
        if self.layout.balanced:
            return [(HOST, self.balancer_port)]
        return [service.address for service in self.services]

    @contextlib.contextmanager
    def running(self) -> Iterator["Product"]:
        """Start everything, and stop it at the end of the block."""
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
                stack.callback(service.release_port)
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
        """Stop a server, and start another one in its place."""
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
        """Check whether every service is ready and known to the load balancer."""
        if not all(service.is_ready() for service in self.services):
            return False
        if not self.layout.balanced:
            return True
        text = ask(HOST, self._balancer_metrics, "/metrics?scope=backend")[2] or ""
        return f'haproxy_backend_active_servers{{proxy="service"}} {len(self.services)}\n' in text

    def circuits_are_closed(self) -> bool:
        """Check whether every service uses every Triton again."""
        texts = [ask(HOST, service.port, "/metrics")[2] or "" for service in self.services]
        found = [re.findall(r"^bertqa_circuit_state{.*} (\S+)$", text, re.MULTILINE) for text in texts]
        return all(states and not any(map(float, states)) for states in found)

    def engine_answers(self) -> bool:
        """Check whether the model is ready in every Triton."""
        paths = f"/v2/models/{MODEL_NAME}/ready"
        return all(ask(HOST, triton.ports.http, paths, timeout=1)[0] == 200 for triton in self.tritons)

    def versions(self) -> set[int]:
        """Return the versions that answer."""
        listed = [ask(HOST, service.port, "/v1/models")[2]["models"] for service in self.services]
        return {models[0]["version"] for models in listed}

    def learn(self) -> None:
        """Record the answers of the current version to all questions, without faults."""
        known = {each.body: each.truth for each in self.asked}
        self.asked = []
        for question in questions():
            found = {answer_of(ask(HOST, service.port, "/v1/answer", question)[2]) for service in self.services}
            assert len(found) == 1, f"the services disagree: {found}"
            body = json.dumps(question).encode()
            self.asked.append(Asked(body, {**known.get(body, {}), **dict(found)}))

    @contextlib.contextmanager
    def _movable_clock(self) -> Iterator[None]:
        """Have libfaketime control the wall clock of every started process, but not the monotonic clock."""
        # install paths of Debian, Arch, Fedora and its own Makefile
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
        """Set the wall clock of every process ahead by the given seconds."""
        partial = self._clock.with_suffix(".partial")
        partial.write_text(f"{seconds:+d}s\n")
        partial.replace(self._clock)

    @contextlib.contextmanager
    def _balancer(self) -> Iterator[None]:
        """Run Debian's HAProxy with the stack's configuration; replicas are given by address, without Docker DNS."""
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

    # Checks of every scenario

    @contextlib.contextmanager
    def watched(self, row: Row, size: Size) -> Iterator[None]:
        """Check that the services are ready after a scenario and hold no more resources than before."""
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
        """Return the services' resources once they are within a bound or the time is up."""
        end = time.monotonic() + SETTLE_S
        for service, body in ((service, questions()[0]) for service in self.services for _ in range(4)):
            ask(HOST, service.port, "/v1/answer", body)  # opens every connection to Triton
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
        """Wait for the engine and then for the services; record how long the services took."""
        until(returned, f"the engine has not come back; see {self.directory}", 120)
        waited = until(self.is_ready, f"not ready again; see {self.directory}")
        row.ready_s = max(row.ready_s or 0.0, waited)
