"""Test that the service shuts down, whatever is still running."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx

from bertqa.manifest import MODEL_NAME, Bundle
from bertqa.repository import Repository
from service.runtime.ports import hold_port
from tests.support.paths import ROOT
from tests.support.repositories import publish_toy_bundle
from tests.support.waiting import until

HELD = """
import asyncio, os, time
from tests.support.toy_model import FakeEngine
from service.app import create_app

def app():
    app = create_app(engine=FakeEngine(os.environ["IDENTITY"]))

    async def hold():
        loop = asyncio.get_running_loop()
        for _ in range(100):
            loop.run_in_executor(None, time.sleep, 60)

    app.add_api_route("/hold", hold, methods=["POST"])
    return app
"""


def is_ready(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{url}/health/ready", trust_env=False, timeout=30).status_code == 200
    return False


def test_threads_that_are_all_busy_do_not_hold_up_the_end(bundle: Bundle, tmp_path: Path) -> None:
    repository = Repository(tmp_path / "models")
    publish_toy_bundle(repository, bundle)
    repository.activate(MODEL_NAME, bundle.version)
    (tmp_path / "held.py").write_text(HELD)
    with hold_port("127.0.0.1", 0, "--port") as held:
        port = held.getsockname()[1]
        environment = {
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, tmp_path))),
            "IDENTITY": bundle.manifest.identity,
            "BERTQA_REPOSITORY": str(tmp_path / "models"),
        }
        with subprocess.Popen(
            [sys.executable, "-m", "uvicorn", "--factory", "held:app", f"--port={port}", "--log-level=warning"],
            env={**os.environ, **environment},
        ) as process:
            try:
                url = f"http://127.0.0.1:{port}"
                until(lambda: is_ready(url))
                assert httpx.post(f"{url}/hold", trust_env=False, timeout=30).status_code == 200
                process.send_signal(signal.SIGTERM)
                began = time.monotonic()
                process.wait(50)
                assert time.monotonic() - began < 15, "it waited for its threads"
            finally:
                process.kill()
