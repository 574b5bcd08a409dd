"""The launcher with several processes behind one port: one scrape tells of all of them."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
from tritonclient.grpc import service_pb2_grpc

from bertqa.manifest import MODEL_NAME, Bundle
from bertqa.repository import Repository
from service.embedded_triton import living_children
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
    assert not list(tmp_path.glob("bertqa-service-*")), "the files they count in are gone"


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
