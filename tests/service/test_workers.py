"""Test the launcher with several processes behind one port: one scrape reports all of them."""

import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import grpc
import httpx
from tritonclient.grpc import service_pb2_grpc

from bertqa.manifest import MODEL_NAME, Bundle
from bertqa.repository import Repository
from service.runtime.ports import hold_port
from service.runtime.processes import living_children
from tests.support.asking import ASKED
from tests.support.paths import ROOT
from tests.support.repositories import publish_toy_bundle
from tests.support.triton_servers import Triton, listening
from tests.support.waiting import until


def scraped(url: str) -> dict[str, float]:
    text = httpx.get(f"{url}/metrics", trust_env=False, timeout=30).text
    return {name: float(value) for name, value in re.findall(r"^([^# ]\S*(?: \S*)*?) (\S+)$", text, re.MULTILINE)}


def test_one_scrape_tells_of_all_workers_and_of_one_that_died(bundle: Bundle, tmp_path: Path) -> None:
    repository = Repository(tmp_path / "models")
    publish_toy_bundle(repository, bundle)
    repository.activate(MODEL_NAME, bundle.version)
    triton = Triton(bundle.manifest.identity)
    with listening(service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server, triton) as address:
        command = [sys.executable, "-m", "service", "--port=0", "--workers=2", f"--triton-url={address}"]
        with subprocess.Popen(
            [*command, f"--repository={tmp_path / 'models'}"],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(tmp_path)},
            stderr=subprocess.PIPE,
            text=True,
        ) as launcher:
            try:
                assert launcher.stderr
                found = next(filter(None, (re.search(r"http://\S+", line) for line in launcher.stderr)))
                check(found[0], launcher.pid, bundle)
                launcher.send_signal(signal.SIGTERM)
                assert launcher.wait(60) == 0
            finally:
                launcher.kill()
    assert not list(tmp_path.glob("bertqa*")), "the files they count in are gone"


def test_a_triton_that_is_not_there_is_reported_once_and_when_it_comes(bundle: Bundle, tmp_path: Path) -> None:
    repository = Repository(tmp_path / "models")
    publish_toy_bundle(repository, bundle)
    repository.activate(MODEL_NAME, bundle.version)
    triton, log = Triton(bundle.manifest.identity), tmp_path / "log"
    with hold_port("127.0.0.1", 0, "--port") as held, log.open("wb") as output:
        port = held.getsockname()[1]
        command = [sys.executable, "-m", "service", "--port=0", f"--triton-url=127.0.0.1:{port}"]
        with subprocess.Popen(
            [*command, f"--repository={tmp_path / 'models'}"], cwd=ROOT, stdout=output, stderr=output
        ) as launcher:
            try:
                until(lambda: "not ready (model bert_qa): No connection to Triton" in log.read_text())
                time.sleep(4)  # in which the launcher asks some thirty times
                assert len(log.read_text().splitlines()) == 2, "at the start, and of the first probe"
                server = grpc.server(ThreadPoolExecutor(4))
                service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(triton, server)
                server.add_insecure_port(f"127.0.0.1:{port}")
                server.start()
                until(lambda: "ready at http://" in log.read_text())
                until(lambda: "ready again (model bert_qa)" in log.read_text())
                launcher.send_signal(signal.SIGTERM)
                assert launcher.wait(60) == 0
                server.stop(None).wait()
            finally:
                launcher.kill()
    assert len(log.read_text().splitlines()) <= 8, log.read_text()


def test_with_a_shutdown_delay_every_worker_answers_until_it_is_over(bundle: Bundle, tmp_path: Path) -> None:
    repository = Repository(tmp_path / "models")
    publish_toy_bundle(repository, bundle)
    repository.activate(MODEL_NAME, bundle.version)
    triton = Triton(bundle.manifest.identity)
    with listening(service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server, triton) as address:
        command = [sys.executable, "-m", "service", "--port=0", "--workers=2", f"--triton-url={address}"]
        with subprocess.Popen(
            [*command, f"--repository={tmp_path / 'models'}"],
            cwd=ROOT,
            env={**os.environ, "BERTQA_SHUTDOWN_DELAY_S": "4"},
            stderr=subprocess.PIPE,
            text=True,
        ) as launcher:
            try:
                assert launcher.stderr
                found = next(filter(None, (re.search(r"http://\S+", line) for line in launcher.stderr)))
                url = found[0]
                (uvicorn,) = living_children(launcher.pid)
                until(lambda: len(serving(uvicorn)) == 2)
                ask = partial(httpx.post, f"{url}/v1/answer", json=ASKED, trust_env=False, timeout=30)
                launcher.send_signal(signal.SIGTERM)
                began = time.monotonic()
                statuses, readiness = [], []
                while time.monotonic() - began < 2.5:  # connections of their own, so that both workers get some
                    statuses.append(ask().status_code)
                    readiness.append(httpx.get(f"{url}/health/ready", trust_env=False, timeout=30).status_code)
                assert {*statuses} == {200}, "accepted until the delay is over"
                assert {*readiness[-10:]} == {503}, "load balancers are told by every worker"
                assert launcher.wait(60) == 0
                assert time.monotonic() - began < 4 + 10, "nothing is held, so the drain is short"
            finally:
                launcher.kill()


def check(url: str, launcher: int, bundle: Bundle) -> None:
    answered = 'bertqa_requests_total{route="/v1/answer",status="200"}'
    asked = 0

    def ask(times: int) -> None:
        nonlocal asked
        for _ in range(times):  # each over a connection of its own, so that both workers get some
            assert httpx.post(f"{url}/v1/answer", json=ASKED, trust_env=False, timeout=30).status_code == 200
        asked += times

    ask(30)
    (uvicorn,) = living_children(launcher)
    metrics = scraped(url)
    assert metrics["process_open_fds"] > 0
    assert metrics["bertqa_asyncio_tasks"] > 0
    assert metrics["process_start_time_seconds"] < time.time()
    assert metrics[answered] == asked
    assert metrics[f'bertqa_model_info{{identity="{bundle.manifest.identity}",model="bert_qa",version="7"}}'] == 1
    assert sum(name.startswith("bertqa_build_info") for name in metrics) == 1
    assert sum(name.startswith("bertqa_circuit_state") for name in metrics) == 1
    first, *_ = sorted(serving(uvicorn))
    os.kill(first, signal.SIGKILL)
    until(lambda: first not in serving(uvicorn) and len(serving(uvicorn)) == 2)
    ask(30)
    assert scraped(url)[answered] == asked, "what the dead one counted still counts"
    assert scraped(url)["bertqa_requests_in_flight"] <= 2


def serving(uvicorn: int) -> list[int]:
    """The workers: uvicorn's children but the tracker of multiprocessing."""
    return [pid for pid in living_children(uvicorn) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
