"""Run docker-compose.yml without Docker: each service's command from the file is a process on this machine.

Each container is replaced by a loopback address, so that all ports stay the same. `Stack` makes the necessary changes:
host names become those addresses, mounts become directories, and the scrape interval becomes one second. What only a
container engine could do (read-only file systems, users and limits) is checked as text.
"""

import asyncio
import contextlib
import http.client
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from service.app import create_app
from service.runtime.http_protocol import BoundedProtocol
from service.runtime.processes import living_children
from service.runtime.triton_process import FLAGS
from service.settings import Settings
from tests.support.checkpoints import write_checkpoint
from tests.support.name_server import Names
from tests.support.paths import ROOT
from tests.support.servers import serving
from tests.support.squad_files import write_squad
from tests.support.toy_model import FakeEngine, toy_bundle
from tests.support.waiting import until

BIN = Path(sys.executable).parent
PATH = os.pathsep.join([str(BIN), os.environ.get("PATH", os.defpath), "/usr/sbin"])  # Debian has HAProxy there
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever http_proxy says
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "bertqa.json"
QUESTION = {"question": "Who wrote the first program?", "context": "Ada Lovelace wrote the first program in London."}
GPU_ONLY = {
    "nv_gpu_utilization",
    "nv_gpu_memory_used_bytes",
    "nv_gpu_memory_total_bytes",
    "nv_gpu_power_usage",
    "nv_gpu_power_limit",
}
"""Metrics that Triton has only where a GPU is; no test here can see them."""


def compose(**environment: str) -> dict[str, Any]:
    """The services of docker-compose.yml, with these variables set."""
    text = (ROOT / "docker-compose.yml").read_text()
    text = re.sub(r"\$\{(\w+):-([^}]*)\}", lambda match: environment.get(match[1], match[2]), text)
    assert "${" not in text
    services: dict[str, Any] = yaml.safe_load(text)["services"]
    return services


def dockerfile() -> dict[str, tuple[str, list[str]]]:
    """For each stage of the Dockerfile what it begins from, and its other instructions."""
    text = (ROOT / "deploy" / "Dockerfile").read_text().replace("\\\n", " ")
    found: dict[str, tuple[str, list[str]]] = {}
    for line in re.findall(r"^[A-Z]+ .*$", text, re.MULTILINE):
        if match := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            instructions: list[str] = []
            found[match[2]] = (match[1], instructions)
        elif found:
            instructions.append(line)
    return found


def entrypoint(service: Mapping[str, Any]) -> list[str]:
    """What a service's container runs before its command."""
    if stated := service.get("entrypoint"):
        return list(stated)
    if "build" in service:
        _, instructions = dockerfile()[service["build"]["target"]]
        (line,) = (line for line in instructions if line.startswith("ENTRYPOINT "))
        return list(json.loads(line.removeprefix("ENTRYPOINT ")))
    return {"prom/prometheus": ["prometheus"], "nvcr.io/nvidia/tritonserver": []}[service["image"].split(":")[0]]


def run(*command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "PATH": PATH}, **options
    )


# The files


def test_compose_file_follows_the_specification() -> None:
    done = run("check-jsonschema", "--builtin-schema", "vendor.compose-spec", "docker-compose.yml", cwd=ROOT)
    assert done.returncode == 0, done.stdout


def test_docker_compose_reads_the_file_as_these_tests_do() -> None:
    done = run("docker-compose", "--profile", "*", "config", "--format", "json", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    read = json.loads(done.stdout)["services"]
    assert read.keys() == compose().keys()
    for name, service in compose().items():
        for key in ("image", "command", "entrypoint", "user", "read_only", "profiles", "restart"):
            assert read[name][key] == service.get(key), (name, key)
        assert {variable: str(value) for variable, value in service.get("environment", {}).items()} == read[name].get(
            "environment", {}
        )


@pytest.mark.parametrize("name", compose())
def test_service_is_contained(name: str) -> None:
    service = compose()[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["user"].split(":")[0] not in ("0", "root")
    assert service["logging"]["options"] == {"max-size": "10m", "max-file": "3"}
    assert {"memory", "pids"} <= service["deploy"]["resources"]["limits"].keys()
    is_job = "build" in service["profiles"] or "loadtest" in service["profiles"]
    assert service["restart"] == ("no" if is_job else "unless-stopped")
    assert is_job or service["healthcheck"]["test"][0] == "CMD"
    assert all(port.startswith(("127.0.0.1:", "::1")) for port in service.get("ports", ()))
    writable = [volume for volume in service.get("volumes", ()) if not volume.endswith(":ro")]
    assert all(not volume.startswith((".", "/")) for volume in writable), "only Docker's own volumes are written to"


def test_images_have_exact_tags() -> None:
    bases = {
        re.sub(r"\$\{PYTHON_VERSION\}", "3.11.14", base).replace("${NGC_RELEASE}", "26.06")
        for base, _ in dockerfile().values()
    }
    images = {service["image"] for service in compose().values()} | {base for base in bases if ":" in base}
    for image in images:
        assert re.search(r":v?\d+\.\d+(\.\d+)?(-[a-z0-9]+)*$", image), image
    assert {f"nvcr.io/nvidia/{name}:26.06-py3" for name in ("tritonserver", "tensorrt")} <= images  # the same release


def test_dockerfile_is_clean_and_copies_what_there_is() -> None:
    done = run("hadolint", "deploy/Dockerfile", cwd=ROOT)
    assert done.returncode == 0, done.stdout
    stages = dockerfile()
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for _, instructions in stages.values():
        for line in instructions:
            if line.startswith("COPY ") and "--from=" not in line:
                for source in line.split()[1:-1]:
                    assert source in sent, f"{source} is kept out by .dockerignore"
                    assert (ROOT / source).exists()
    for service in compose().values():
        if "build" in service:
            _, instructions = stages[service["build"]["target"]]
            assert "USER 1000:1000" in instructions
            assert entrypoint({**service, "entrypoint": None})
    for base, instructions in stages.values():
        installs = [part for line in instructions for part in line.split("&&") if "pip install" in part]
        assert all("--constraint constraints.txt" in part for part in installs)
        if installs:  # what builds our own package is pinned too
            lines = [*stages.get(base, ("", []))[1], *instructions]
            assert any("PIP_BUILD_CONSTRAINT=/app/constraints.txt" in line for line in lines)


def test_gpu_triton_has_the_flags_of_the_embedded_one() -> None:
    flags = [flag for flag in compose()["triton-gpu"]["command"][1:] if not flag.startswith("--model-repository=")]
    assert sorted(flags) == sorted(FLAGS)


def test_load_balancer_configuration_is_valid_as_it_is() -> None:
    done = run("haproxy", "-c", "-f", str(ROOT / "deploy" / "haproxy.cfg"))
    assert done.returncode == 0, done.stderr
    (threads,) = re.findall(r"^ +nbthread (\d+)$", (ROOT / "deploy" / "haproxy.cfg").read_text(), re.MULTILINE)
    # By default there is one for each core, of which a machine may have more than the container's processes.
    assert int(threads) < compose()["lb"]["deploy"]["resources"]["limits"]["pids"] / 2


@pytest.fixture(scope="module")
def behind_load_balancer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of HAProxy with our configuration, but for addresses and checks, before a toy service."""
    with contextlib.ExitStack() as stack:
        ports = [stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(2)]
    bundle = toy_bundle()
    app = create_app(Settings(), engine=FakeEngine(bundle.manifest.identity), bundle=bundle)
    with serving(app, http=BoundedProtocol) as url:
        text = (ROOT / "deploy" / "haproxy.cfg").read_text()
        text = text.replace("bind :8000", f"bind 127.0.0.1:{ports[0]}").replace(":8405", f"127.0.0.1:{ports[1]}")
        server = f"server one {urllib.parse.urlsplit(url).netloc}"
        text = re.sub("^ +server-template .*$", f"    {server}", text, flags=re.MULTILINE)
        text = text.replace("    parse-resolv-conf\n", "")
        configuration = tmp_path_factory.mktemp("haproxy") / "haproxy.cfg"
        configuration.write_text(text)
        process = subprocess.Popen(["haproxy", "-f", str(configuration)], env={**os.environ, "PATH": PATH})
        try:
            until(lambda: raw_get(ports[0], "/health/live").startswith(b"HTTP/1.1 200 "), "HAProxy does not answer")
            yield ports[0]
        finally:
            process.terminate()
            process.wait(30)


def raw_get(port: int, target: str) -> bytes:
    """The reply to a request whose target no client library has touched; empty if nobody listens."""
    received = b""
    with contextlib.suppress(ConnectionError), socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(f"GET {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        while piece := connection.recv(65536):
            received += piece
    return received


@pytest.mark.parametrize(
    "target",
    [
        "/metrics",
        "/metrics?x=1",
        "/metrics#x",
        "/metrics/",
        "/%6detrics",
        "/%6Detric%73",
        "/%6d%65%74%72%69%63%73",
        "//metrics",
        "/./metrics",
        "/%2e/metrics",
        "/.%2f/metrics",
        "/%2fmetrics",
        "/../metrics",
        "/static/../metrics",
        "/static/%2e%2e/%6detrics",
        "http://x/metrics",
        "http://x/%6detrics",
        "/%256detrics",
        "/%25%36detrics",
        "/metrics%00",
        "/metrics%20",
        "/metrics%zz",
        "/metrics;x",
        "/METRICS",
    ],
)
def test_load_balancer_shows_nobody_the_metrics(behind_load_balancer: int, target: str) -> None:
    received = raw_get(behind_load_balancer, target)
    assert re.match(rb"HTTP/1.1 40[04] ", received), received[:100]
    assert b"bertqa_" not in received


def test_load_balancer_lets_other_paths_pass(behind_load_balancer: int) -> None:
    for target in ("/info", "/health/live", "/%69nfo", "/v1/models", "/static/index.html", "/"):
        assert raw_get(behind_load_balancer, target).startswith(b"HTTP/1.1 200 "), target
    assert raw_get(behind_load_balancer, "/models/metrics").startswith(b"HTTP/1.1 405 ")  # a model may be called so


def test_every_alert_fires_when_all_goes_wrong_and_none_when_all_is_well() -> None:
    directory = ROOT / "deploy" / "prometheus"
    checked = run("promtool", "check", "config", str(directory / "prometheus.yml"))
    assert checked.returncode == 0, checked.stderr
    tested = run("promtool", "test", "rules", str(directory / "alerts_test.yml"))
    assert tested.returncode == 0, tested.stdout + tested.stderr
    (group,) = yaml.safe_load((directory / "alerts.yml").read_text())["groups"]
    expected = (directory / "alerts_test.yml").read_text()
    assert all(f'alertname="{rule["alert"]}"' in expected for rule in group["rules"])
    assert all(rule["annotations"]["runbook"] for rule in group["rules"])
    runbook = (ROOT / "docs" / "operations.md").read_text().partition("\n## Runbook\n")[2]
    sections = re.findall(r"^### (\w+)\n\n\S", runbook, re.MULTILINE)
    assert sections == [rule["alert"] for rule in group["rules"]]
    for rule in group["rules"]:
        assert rule["annotations"]["section"] == f"docs/operations.md#{rule['alert'].lower()}"


def test_dashboard_can_be_provisioned() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    provisioned = ROOT / "deploy" / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioned / "datasources" / "prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioned / "dashboards" / "bertqa.yml").read_text())["providers"]
    grafana = compose()["grafana"]
    assert f"./deploy/grafana/dashboards:{provider['options']['path']}:ro" in grafana["volumes"]
    assert grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"].startswith(provider["options"]["path"])
    assert urllib.parse.urlsplit(source["url"]).hostname in compose()
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    squares: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not own & squares, f"{panel['title']} lies on another panel"
        assert place["x"] + place["w"] <= 24
        squares |= own
        for target in panel.get("targets", ()):
            assert target["datasource"] == {"type": source["type"], "uid": source["uid"]}


# The stack


class Container:
    """A process in the place of a container."""

    def __init__(self, name: str, address: str, service: Mapping[str, Any], log: Path) -> None:
        self.name = name
        self.address = address
        self.service = service
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None

    def is_healthy(self) -> bool:
        """The URL that the health check of the compose file asks."""
        assert self.process
        assert self.process.poll() is None, f"{self.name} ended: {self.log.read_text()}"
        (url,) = re.findall(r"http://[\w.:/-]+", " ".join(self.service["healthcheck"]["test"]))
        try:
            return get(url.replace("127.0.0.1", self.address))[0] == 200
        except OSError:
            return False

    def stop(self) -> int:
        """As ``docker stop`` does; gives the exit code."""
        assert self.process
        number = getattr(signal, self.service.get("stop_signal", "SIGTERM"))
        self.process.send_signal(number)
        try:
            return self.process.wait(float(self.service["stop_grace_period"].removesuffix("s")))
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def kill(self) -> None:
        """As a container dies: all of its processes at once."""
        assert self.process
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGSTOP)  # so that no process sees another one go
        for child in descendants(self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        self.process.wait(60)


def descendants(pid: int) -> list[int]:
    """A process and all that came of it, the youngest first."""
    children = living_children(pid)
    return [*(grandchild for child in children for grandchild in descendants(child)), pid]


class Stack:
    """Containers by name, and the addresses they have."""

    def __init__(self, directory: Path, names: Names) -> None:
        self.directory = directory
        self.names = names
        self.name_server = ""
        self.network = f"127.{64 + os.getpid() % 128}.{os.getpid() // 128 % 256}"
        self.containers: dict[str, Container] = {}
        self.services = compose(
            BERTQA_MODELS=str(directory / "models"), BERTQA_CHECKPOINTS=str(directory / "checkpoints")
        )

    def address(self, name: str) -> str:
        order = [
            "lb",
            "triton-cpu",
            "prometheus",
            "loadtest",
            "builder-cpu",
            "bertqa",
            "batch",
            "service-1",
            "service-2",
        ]
        return f"{self.network}.{order.index(name) + 2}"

    def adapted(self, text: str, name: str) -> str:
        """A command, variable or configuration, of one container, in the words of this machine."""
        for found, instead in (
            ("0.0.0.0", self.address(name)),
            ("bind :", f"bind {self.address(name)}:"),
            ("triton:8001", f"{self.address('triton-cpu')}:8001"),
            ("lb:8000", f"{self.address('lb')}:8000"),
            ("lb:8405", f"{self.address('lb')}:8405"),
            ("parse-resolv-conf", f"nameserver names {self.name_server}"),
            ("scrape_interval: 5s", "scrape_interval: 1s"),
            # Prometheus takes its name server from /etc/resolv.conf and from nowhere else.
            (
                "dns_sd_configs: [{names: [service], type: A, port: 8000, refresh_interval: 5s}]",
                self._targets("service"),
            ),
            ("dns_sd_configs: [{names: [triton], type: A, port: 8002, refresh_interval: 5s}]", self._targets("triton")),
        ):
            text = text.replace(found, instead)
        return text

    def _targets(self, name: str) -> str:
        port, containers = {"service": (8000, ("service-1", "service-2")), "triton": (8002, ("triton-cpu",))}[name]
        return f"static_configs: [targets: {[f'{self.address(container)}:{port}' for container in containers]}]"

    def command(self, name: str, arguments: Sequence[str] | None = None) -> list[str]:
        """What the container would run, with the arguments of ``docker compose run`` in the place of the file's."""
        service = self.services[re.sub(r"-\d$", "", name)]
        words = [*entrypoint(service), *(service["command"] if arguments is None else arguments)]
        if name == "prometheus":
            words.append(f"--web.listen-address={self.address(name)}:9090")
        return self._here(words, name)

    def _here(self, words: Sequence[str], name: str) -> list[str]:
        """Words of a container's command or environment, with the paths and addresses of this machine."""
        mounts = {"/app": str(ROOT)}
        for volume in self.services[re.sub(r"-\d$", "", name)].get("volumes", ()):
            source, target = volume.removesuffix(":ro").split(":")
            mounts[target] = str(self._mounted(source, name))
        for target, source in mounts.items():
            words = [re.sub(rf"(^|=){re.escape(target)}(?=/|$)", lambda m: m[1] + source, word) for word in words]  # noqa: B023
        return [self.adapted(word, name) for word in words]

    def _mounted(self, source: str, name: str) -> Path:
        """The file or directory of a mount; our configuration is mounted as an adapted copy."""
        if source.startswith("./deploy/"):
            copy = self.directory / name / Path(source).name
            originals = [ROOT / source] if (ROOT / source).is_file() else [*(ROOT / source).iterdir()]
            for original in originals:
                target = copy / original.name if (ROOT / source).is_dir() else copy
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(self.adapted(original.read_text(), name))
            return copy
        path = Path(source) if source.startswith("/") else self.directory / "volumes" / source
        path.mkdir(parents=True, exist_ok=True)
        return path

    def environment(self, name: str) -> dict[str, str]:
        stated = self.services[re.sub(r"-\d$", "", name)].get("environment", {})
        own = {"PATH": PATH, "HOME": str(self.directory), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        kept = {key: str(value) for key, value in stated.items() if key != "TMPDIR"}
        return own | dict(zip(kept, self._here([*kept.values()], name), strict=True))

    def start(self, name: str) -> None:
        service = self.services[re.sub(r"-\d$", "", name)]
        container = Container(name, self.address(name), service, self.directory / f"{name}.log")
        with container.log.open("ab") as log:
            container.process = subprocess.Popen(
                self.command(name),
                cwd=ROOT,
                env=self.environment(name),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.containers[name] = container

    def run(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A job to its end, as ``docker compose run``."""
        return subprocess.run(
            self.command(name, arguments or None),
            cwd=ROOT,
            env=self.environment(name),
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )

    def url(self, name: str, port: int) -> str:
        return f"http://{self.address(name)}:{port}"

    def answered(self, replica: str) -> int:
        """Questions that a replica has answered so far."""
        text = get(self.url(replica, 8000) + "/metrics")[1].decode()
        found = re.search(r'^bertqa_requests_total\{route="/v1/answer",status="200"\} (\S+)$', text, re.MULTILINE)
        return int(float(found[1])) if found else 0


def get(url: str) -> tuple[int, bytes]:
    try:
        with DIRECT.open(url, timeout=5) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def post(url: str, body: object) -> tuple[int, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with DIRECT.open(request, timeout=30) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


@contextlib.contextmanager
def name_server() -> Iterator[tuple[Names, str]]:
    """A name server for the load balancer, at first without any address."""
    names = Names()
    loop = asyncio.new_event_loop()
    transport, _ = loop.run_until_complete(
        loop.create_datagram_endpoint(lambda: names, ("127.0.0.1", 0))  # in the thread below from now on
    )
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield names, "{}:{}".format(*transport.get_extra_info("sockname"))
    finally:
        loop.call_soon_threadsafe(transport.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.run_until_complete(asyncio.sleep(0))  # the socket is closed one turn after its transport
        loop.close()


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The profiles cpu and monitoring, started in the order of the compose file, with two replicas."""
    directory = tmp_path_factory.mktemp("stack")
    checkpoint = write_checkpoint(directory / "checkpoints" / "tiny")
    write_squad(checkpoint / "gate.json")
    shutil.copytree(
        ROOT / "checkpoints" / "minilm-l6-squad",
        directory / "checkpoints" / "minilm-l6-squad",
        ignore=shutil.ignore_patterns("*.safetensors"),
    )
    with name_server() as (names, address):
        stack = Stack(directory, names)
        stack.name_server = address
        built = stack.run(
            "builder-cpu", "--checkpoint", str(checkpoint), "--target", "cpu", "--precision", "fp32", "--threads", "1"
        )
        assert built.returncode == 0, built.stderr
        try:
            stack.start("prometheus")
            stack.start("triton-cpu")
            until_it_is_healthy(stack, "triton-cpu")
            for name in ("service-1", "service-2", "lb"):
                stack.start(name)
            for name in stack.containers:
                until_it_is_healthy(stack, name)
            names.addresses = (stack.address("service-1"), stack.address("service-2"))
            until(lambda: get(stack.url("lb", 8000) + "/health/ready")[0] == 200, "the load balancer finds no replica")
            yield stack
            codes = {name: stack.containers.pop(name).stop() for name in ("lb", "service-1", "service-2", "triton-cpu")}
            assert codes == dict.fromkeys(codes, 0)
        finally:
            for container in stack.containers.values():
                container.kill()


@contextlib.contextmanager
def asking(stack: Stack) -> Iterator[None]:
    """Four clients that ask through the load balancer without pause; every one of their requests is answered."""
    end = threading.Event()
    failures: list[str] = []
    answered = [0] * 4
    body = json.dumps(QUESTION)

    def ask(client: int) -> None:
        connection = http.client.HTTPConnection(stack.address("lb"), 8000, timeout=30)
        try:
            while not end.is_set():
                connection.request("POST", "/v1/answer", body, {"content-type": "application/json"})
                response = connection.getresponse()
                reply = response.read()
                if response.status != 200 or not json.loads(reply)["answers"]:
                    failures.append(f"{response.status} {reply!r}")
                answered[client] += 1
        except Exception as error:
            failures.append(repr(error))
        finally:
            connection.close()

    clients = [threading.Thread(target=ask, args=(number,)) for number in range(len(answered))]
    for client in clients:
        client.start()
    try:
        yield
    finally:
        end.set()
        for client in clients:
            client.join()
    assert not failures, f"{len(failures)} of {sum(answered)}: {failures[:3]}"
    assert all(answered)


def until_it_is_healthy(stack: Stack, name: str) -> None:
    container = stack.containers[name]
    until(container.is_healthy, f"{name} is not healthy; its log is {container.log}")


def until_it_answers(stack: Stack, *replicas: str) -> None:
    """Each of them has answered 20 questions more."""
    before = {replica: stack.answered(replica) for replica in replicas}
    until(
        lambda: all(stack.answered(replica) >= before[replica] + 20 for replica in replicas),
        f"no answers of {' or '.join(replicas)}",
    )


@pytest.mark.triton
def test_replicas_that_are_added_get_their_share(stack: Stack) -> None:
    first, second = "service-1", "service-2"
    with asking(stack):
        until_it_answers(stack, first, second)
        stack.names.addresses = (stack.address(first),)  # --scale service=1
        until(lambda: servers_up(stack) == 1, "the second replica is still there")
        before = stack.answered(second)
        until_it_answers(stack, first)
        assert stack.answered(second) <= before + 4  # what was on its way
        stack.names.addresses = (stack.address(first), stack.address(second))
        until_it_answers(stack, first, second)


def servers_up(stack: Stack) -> int:
    text = get(stack.url("lb", 8405) + "/metrics?scope=backend")[1].decode()
    (found,) = re.findall(r'^haproxy_backend_active_servers\{proxy="service"\} (\S+)$', text, re.MULTILINE)
    return int(float(found))


@pytest.mark.triton
def test_no_request_is_lost_when_a_replica_dies_or_is_stopped(stack: Stack) -> None:
    first, second = "service-1", "service-2"
    with asking(stack):
        until_it_answers(stack, first, second)
        stack.containers[second].kill()
        until_it_answers(stack, first)
        until(lambda: servers_up(stack) == 1, "the load balancer has not noticed")
        stack.start(second)
        until_it_is_healthy(stack, second)
        until_it_answers(stack, first, second)
        assert stack.containers[first].stop() == 0
        until_it_answers(stack, second)
    stack.start(first)
    until_it_is_healthy(stack, first)
    until(lambda: servers_up(stack) == 2, "the load balancer has not noticed")


@pytest.mark.triton
def test_load_balancer_speaks_as_the_service_does(stack: Stack) -> None:
    url = stack.url("lb", 8000)
    status, reply = get(url + "/metrics")
    assert (status, json.loads(reply)["error_type"]) == (404, "not_found")
    assert post(url + "/v1/answer", {"question": ""})[0] == 422
    long = {**QUESTION, "context": "Ada Lovelace wrote the first program in London. " * 1500}  # more than it keeps
    status, reply = post(url + "/v1/answer", long)
    assert status == 200, reply
    assert reply["windows"] > 100
    stack.names.addresses = (f"{stack.network}.99",)  # where nobody is
    try:
        until(lambda: post(url + "/v1/answer", QUESTION)[0] == 503, "it still answers", 30)
        assert post(url + "/v1/answer", QUESTION)[1]["error_type"] == "no_replica"
    finally:
        stack.names.addresses = (stack.address("service-1"), stack.address("service-2"))
    until(lambda: get(url + "/health/ready")[0] == 200, "no replica has come back")


@pytest.mark.triton
def test_versions_are_listed_and_looked_at_from_the_stack(stack: Stack) -> None:
    listed = stack.run("bertqa")
    assert listed.returncode == 0, listed.stderr
    heading, *rows = [line.split() for line in listed.stdout.splitlines()]
    assert heading[:4] == ["MODEL", "VERSION", "SERVED", "TRITON"]
    assert [row[:4] for row in rows] == [["bert_qa", "1", "active", "ready"]]
    looked = stack.run("bertqa", "doctor", "--triton-url", "triton:8001")
    assert looked.returncode == 0, looked.stdout + looked.stderr
    assert "answers 2 questions as at build time" in looked.stdout


@pytest.mark.triton
def test_a_batch_is_answered_by_the_same_engine(stack: Stack) -> None:
    data = stack.directory / "volumes" / "data"
    data.mkdir(parents=True)
    pq.write_table(
        pa.table({"question": [QUESTION["question"]] * 3, "context": [QUESTION["context"]] * 3}), data / "in.parquet"
    )
    done = stack.run("batch", "--input", "/data/in.parquet", "--output", "/data/out")
    assert done.returncode == 0, done.stderr
    answers = pq.read_table(data / "out").to_pylist()
    _, served = post(stack.url("lb", 8000) + "/v1/answer", QUESTION)
    assert [(row["row"], row["answer"]) for row in answers] == [(n, served["answers"][0]["text"]) for n in range(3)]


@pytest.mark.triton
def test_load_test_finds_no_fault(stack: Stack) -> None:
    done = stack.run("loadtest", "--users", "4", "--spawn-rate", "4", "--run-time", "3s")
    assert done.returncode == 0, done.stdout + done.stderr
    total = next(line for line in done.stderr.splitlines() + done.stdout.splitlines() if "Aggregated" in line)
    requests, failures = re.findall(r"\d+(?=\()|\d+", total)[:2]
    assert int(requests) > 4
    assert int(failures) == 0


def query(stack: Stack, expression: str) -> list[float]:
    """The values that Prometheus gives now, but those that are none."""
    url = f"{stack.url('prometheus', 9090)}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
    status, reply = get(url)
    assert status == 200, f"{expression}: {reply.decode()}"
    values = [float(sample["value"][1]) for sample in json.loads(reply)["data"]["result"]]
    return [value for value in values if not math.isnan(value)]


@pytest.mark.triton
def test_every_panel_of_the_dashboard_has_data(stack: Stack) -> None:
    post(stack.url("lb", 8000) + "/v1/answer", {"question": ""})  # an error, to be seen among the errors
    expressions = {
        target["expr"].replace("$__rate_interval", "30s"): panel["title"]
        for panel in json.loads(DASHBOARD.read_text())["panels"]
        for target in panel.get("targets", ())
    }
    waiting = {expression for expression in expressions if not GPU_ONLY & set(metrics_in(expression))}
    assert len(waiting) > 25
    with asking(stack):
        end = time.monotonic() + 30
        while waiting and time.monotonic() < end:
            post(stack.url("lb", 8000) + "/v1/answer", {"question": ""})
            waiting = {expression for expression in waiting if not query(stack, expression)}
            time.sleep(0.5)
    assert not waiting, [f"{expressions[expression]}: {expression}" for expression in waiting]


def metrics_in(expression: str) -> list[str]:
    return re.findall(r"\b(?:bertqa|nv|haproxy|process)_\w+|\bup\b", expression)


@pytest.mark.triton
def test_every_metric_of_the_alerts_is_there(stack: Stack) -> None:
    (group,) = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yml").read_text())["groups"]
    wanted = {metric for rule in group["rules"] for metric in metrics_in(rule["expr"])} - GPU_ONLY
    assert len(wanted) > 5

    def missing() -> set[str]:
        names = get(stack.url("prometheus", 9090) + "/api/v1/label/__name__/values")[1]
        return wanted - set(json.loads(names)["data"])

    until(lambda: not missing(), f"Prometheus has no {missing()}", 30)
    rules = json.loads(get(stack.url("prometheus", 9090) + "/api/v1/rules")[1])["data"]["groups"][0]["rules"]
    assert [rule["name"] for rule in rules] == [rule["alert"] for rule in group["rules"]]
    assert all(rule["health"] != "err" for rule in rules)
