"""The real application with the shipped tokenizer, and an engine that gives random answers without computing.

It runs as a separate process, as the launcher starts one: ``uvicorn tests.chaos.toy_service:create --factory``.
"""

import asyncio
import contextlib
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from fastapi import FastAPI
from tokenizers import Tokenizer

from bertqa.spans import Logits
from bertqa.windows import Window
from service.app import create_app
from service.settings import Settings
from tests.chaos.wire import Address, get
from tests.support.paths import CHECKPOINT, ROOT
from tests.support.ports import free_port
from tests.support.toy_model import FakeEngine, toy_bundle
from tests.support.waiting import until

CALL_S, PLANTED_S = "CHAOS_CALL_S", "CHAOS_PLANTED_S"
"""Environment variables: seconds per engine call, and seconds for which a call holds the event loop."""
INSTANCES = 2


class RandomEngine(FakeEngine):
    """An engine with random logits, the same for the same window, so that any span may be the best."""

    def __init__(self, identity: str, call_s: float = 0.0, planted_s: float = 0.0) -> None:
        super().__init__(identity)
        self._call_s, self._planted_s = call_s, planted_s
        if call_s:
            self.concurrency = 2 * INSTANCES
        if planted_s:
            self.concurrency = 1  # so that a deadline ends the remaining calls
        self._instances = asyncio.Semaphore(INSTANCES)

    async def predict(self, windows: Sequence[Window], *, deadline: float) -> list[Logits]:
        time.sleep(self._planted_s)
        if self._call_s:
            async with self._instances:
                await asyncio.sleep(self._call_s)
        else:
            await asyncio.sleep(0)  # yields, as every real engine does
        return [self.logits(window) for window in windows]

    @staticmethod
    def logits(window: Window) -> Logits:
        random = np.random.default_rng(zlib.crc32(window.input_ids.tobytes()))
        start, end = random.normal(scale=4, size=(2, 1, window.length)).astype(np.float32)
        return start, end


def application(**settings: object) -> FastAPI:
    """Create the service with the shipped tokenizer, and windows so short that most texts need several."""
    return _application(Settings(**settings))  # type: ignore[arg-type]


def create() -> FastAPI:
    """Create the application with the settings and engine from the environment."""
    call_s, planted_s = (float(os.environ[name]) for name in (CALL_S, PLANTED_S))
    return _application(Settings.from_environment(os.environ), call_s, planted_s)


def _application(settings: Settings, call_s: float = 0.0, planted_s: float = 0.0) -> FastAPI:
    bundle = toy_bundle(Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")))
    return create_app(settings, engine=RandomEngine(bundle.manifest.identity, call_s, planted_s), bundle=bundle)


@contextlib.contextmanager
def toy_service(
    log: Path, settings: Mapping[str, object] | None = None, *, call_s: float = 0.0, planted_s: float = 0.0
) -> Iterator[tuple[Address, int]]:
    """Run the service with the flags of `bertqa serve`; yield host and port, and the process id.

    Args:
        log: file for its output.
        settings: settings of the service.
        call_s: seconds per engine call, with `INSTANCES` concurrent calls; 0 for no delay.
        planted_s: seconds for which each call holds the event loop, as a fault.
    """
    address = "127.0.0.1", free_port()
    command = [sys.executable, "-m", "uvicorn", "tests.chaos.toy_service:create", "--factory", f"--port={address[1]}"]
    command += ["--loop=uvloop", "--http=service.runtime.http_protocol:BoundedProtocol"]
    command += ["--no-access-log", "--no-server-header", "--log-level=warning"]
    variables = {f"BERTQA_{name.upper()}": str(value) for name, value in (settings or {}).items()}
    variables |= {CALL_S: str(call_s), PLANTED_S: str(planted_s)}
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, env={**os.environ, **variables})
    try:
        until(lambda: process.poll() is not None or get(address, "/health/ready").status == 200, f"not up: see {log}")
        assert process.poll() is None, log.read_text()
        yield address, process.pid
    finally:
        process.terminate()
        process.wait(60)
