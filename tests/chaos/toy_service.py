"""The real application over the shipped tokenizer, with an engine that computes nothing and answers anything.

A process of its own, as the launcher starts one: ``uvicorn tests.chaos.toy_service:create --factory``.
"""

import contextlib
import subprocess
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from fastapi import FastAPI
from tokenizers import Tokenizer

from bertqa.spans import Logits
from bertqa.windows import Window
from service.app import create_app
from service.settings import Settings
from tests.support.paths import CHECKPOINT, ROOT
from tests.support.ports import free_port
from tests.support.toy_model import FakeEngine, toy_bundle
from tests.support.waiting import until


class RandomEngine(FakeEngine):
    """Its logits are random, always the same for the same window: any span may be the best."""

    async def predict(self, windows: Sequence[Window], *, deadline: float) -> list[Logits]:
        return [self.logits(window) for window in windows]

    @staticmethod
    def logits(window: Window) -> Logits:
        random = np.random.default_rng(zlib.crc32(window.input_ids.tobytes()))
        start, end = random.normal(scale=4, size=(2, 1, window.length)).astype(np.float32)
        return start, end


def application(**settings: object) -> FastAPI:
    """The service over the shipped tokenizer, with windows so short that most texts need several."""
    bundle = toy_bundle(Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")))
    return create_app(Settings(**settings), engine=RandomEngine(bundle.manifest.identity), bundle=bundle)  # type: ignore[arg-type]


def create() -> FastAPI:
    """The application with default settings."""
    return application()


@contextlib.contextmanager
def toy_service(log: Path) -> Iterator[tuple[tuple[str, int], int]]:
    """Run it with the flags of `bertqa serve`; gives host and port, and the process id."""
    from tests.chaos.wire import get

    address = "127.0.0.1", free_port()
    command = [sys.executable, "-m", "uvicorn", "tests.chaos.toy_service:create", "--factory", f"--port={address[1]}"]
    command += ["--loop=uvloop", "--http=service.protocol:BoundedProtocol"]
    command += ["--no-access-log", "--no-server-header", "--log-level=warning"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
    try:
        until(lambda: process.poll() is not None or get(address, "/health/ready").status == 200, f"not up: see {log}")
        assert process.poll() is None, log.read_text()
        yield address, process.pid
    finally:
        process.terminate()
        process.wait(60)
