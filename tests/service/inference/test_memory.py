"""A whole process under a mix of hostile clients stays below 512 MiB, with the settings that everybody gets."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from pathlib import Path

import pytest

from tests.support.paths import ROOT

BOUND_MIB = 512
HOSTILE_S = 10.0
CLIENTS = 16  # of each kind
ANSWERED = 3  # hostile requests; a slow machine gets longer for them

# The real application, protocol and tokenizer, and an engine that takes a while.
SERVER = """
import os, socket, sys
from dataclasses import replace
import uvicorn
from bertqa.windows import WindowTokenizer
from service.app import create_app
from service.runtime.http_protocol import BoundedProtocol
from service.settings import Settings
from tests.support.decoding_cases import TOKENIZER
from tests.support.toy_model import FakeEngine, toy_bundle

tokenizer = WindowTokenizer(TOKENIZER)
bundle = toy_bundle(TOKENIZER)
manifest = replace(bundle.manifest, max_seq_len=384, buckets=tokenizer.buckets, overlap=128, max_question_tokens=64)
bundle = replace(bundle, manifest=manifest, tokenizer=tokenizer)
engine = FakeEngine(manifest.identity)
engine.delay_s = 0.01
app = create_app(Settings(cache_mb=int(sys.argv[2])), engine=engine, bundle=bundle)
config = uvicorn.Config(app, fd=int(sys.argv[1]), http=BoundedProtocol, access_log=False, log_level="warning")
uvicorn.Server(config).run()
"""

SPACES = {"question": "who", "context": (" " * 14_000).join("abcdefghijklmn"), "top_k": 100}
LETTERS = {"question": "who", "context": "q" * 200_000}
WORDS = {"question": "who", "context": "the tower of London is old. " * 7_142}
UNLIKE = {"question": "who", "context": " ".join(f"é{n:x}" for n in range(30_000))[:200_000]}
HANGUL = {"question": "who", "context": " ".join(["각" * 30] * 48), "overlap": 379, "top_k": 100}
MANY = {"questions": [{**SPACES, "context": (" " * 2_200).join("abcdefghijklmn")} for _ in range(64)]}
WIDE = {"questions": [{"question": "who", "context": "x y " * 5_000 + "😀"} for _ in range(64)]}


@contextmanager
def server(cache_mb: int) -> Iterator[tuple[int, int]]:
    """A process of the service; gives its number and its port."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(listener.fileno()), str(cache_mb)],
            pass_fds=(listener.fileno(),),
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        try:
            yield process.pid, listener.getsockname()[1]
            assert process.poll() is None, "it lives"
        finally:
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()


def peak_mib(process: int) -> int:
    status = Path(f"/proc/{process}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found
    return int(found[1]) >> 10


def message(path: str, body: object) -> bytes:
    text = json.dumps(body, ensure_ascii=False).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(text)}\r\n\r\n"
    return head.encode() + text


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection of a client whose system takes little of a reply that it does not read."""
    with closing(socket.socket()) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", port))
        reader, writer = await asyncio.open_connection(sock=connection, limit=4096)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()
            with suppress(OSError):
                await writer.wait_closed()


async def ask(port: int, sent: bytes, statuses: Counter[str], until: float, *, reads: bool = True) -> None:
    """Send a request again and again; without reading, its reply waits at the server."""
    while time.monotonic() < until:
        with suppress(OSError, ValueError):
            async with connected(port) as (reader, writer):
                writer.write(sent)
                if not reads:
                    await asyncio.sleep(max(until - time.monotonic(), 0))
                status = int((await reader.readline())[9:12])
                writer.write(b"GET /health/live HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
                body = b""
                while part := await reader.read(1 << 16):
                    body = part if status == 200 else body + part
                found = re.search(rb'"error_type": "(\w+)"', body)
                statuses[found[1].decode() if found and status != 200 else "answered"] += 1


async def hold(port: int, until: float) -> None:
    """Send all of a large body but its last byte."""
    async with connected(port) as (_, writer):
        with suppress(OSError):
            writer.write(message("/v1/answer", {"question": "who", "context": "x" * ((2 << 20) - 200)})[:-1])
            await writer.drain()
        await asyncio.sleep(max(until - time.monotonic(), 0))


async def attack(port: int) -> Counter[str]:
    statuses: Counter[str] = Counter()
    until = time.monotonic() + HOSTILE_S
    last = until + 30
    work = [hold(port, last) for _ in range(CLIENTS)]
    for body in (SPACES, LETTERS, WORDS, UNLIKE, HANGUL, MANY, WIDE):
        sent = message("/v1/answers" if "questions" in body else "/v1/answer", body)
        work += [ask(port, sent, statuses, last) for _ in range(CLIENTS)]
        work += [ask(port, sent, statuses, last, reads=False) for _ in range(CLIENTS // 4)]
    tasks = [asyncio.create_task(each) for each in work]
    await asyncio.wait(tasks, timeout=HOSTILE_S)
    while statuses["answered"] < ANSWERED and time.monotonic() < last:
        await asyncio.sleep(0.2)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return statuses


@pytest.mark.parametrize("cache_mb", [0, 64], ids=["no cache", "cache"])
def test_a_process_stays_below_its_bound_whatever_clients_send(cache_mb: int) -> None:
    with server(cache_mb) as (process, port):
        once: Counter[str] = Counter()
        simple = message("/v1/answer", {"question": "who", "context": "It was «Uber»."})
        end = time.monotonic() + 60
        while not once["answered"]:
            assert time.monotonic() < end
            with suppress(OSError, TimeoutError, asyncio.TimeoutError):
                asyncio.run(asyncio.wait_for(ask_once(port, simple, once), 5))
        before = peak_mib(process)
        statuses = asyncio.run(attack(port))
        peak = peak_mib(process)
        print(f"{before} MiB before, {peak} MiB at most; {dict(statuses)}")
        assert statuses["answered"] >= ANSWERED
        assert statuses["engine_overloaded"] + statuses["bodies_overloaded"] > 5, "clients have come to the bounds"
        assert set(statuses) <= {"answered", "engine_overloaded", "bodies_overloaded", "engine_timeout", "slow_request"}
        assert peak < BOUND_MIB


async def ask_once(port: int, sent: bytes, statuses: Counter[str]) -> None:
    async with connected(port) as (reader, writer):
        writer.write(sent)
        statuses["answered"] += (await reader.readline())[9:12] == b"200"
