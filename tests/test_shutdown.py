"""The end of the service, whatever holds it up."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
from conftest import toy_bundle
from test_logs import is_ready, until, write_models

from service.runtime.ports import hold_port

ROOT = Path(__file__).resolve().parent.parent
HELD = """
import asyncio, os, time
from conftest import FakeEngine
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


def test_threads_that_are_all_busy_do_not_hold_up_the_end(tmp_path: Path) -> None:
    bundle = toy_bundle()
    write_models(tmp_path / "models", bundle)
    (tmp_path / "held.py").write_text(HELD)
    with hold_port("127.0.0.1", 0, "--port") as held:
        port = held.getsockname()[1]
        environment = {
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", tmp_path))),
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
