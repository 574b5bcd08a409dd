"""What the service adds to its engine: throughput and latency against clients, overload, and long texts.

Starts the real product, twice: with the engine of the repository, and with one that sleeps a fixed time, so that cores
do not limit. Closed-loop clients post real one-window questions over REST and, in turns with that, send the prepared
tensors of the same questions to Triton over gRPC. A client that is refused comes back when ``retry-after`` says. The
service's CPU time is read from the clock of its process; clients run here and are not counted.

Several repositories are measured in turns at each number of clients, and drawn on the same axes.
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc.aio
import numpy as np
import psutil
import uvloop
from tritonclient.grpc import service_pb2

from bertqa.hardware import cpu_name
from bertqa.manifest import MODEL_NAME
from bertqa.repository import Repository
from bertqa.squad import Example, read_squad
from bertqa.windows import INPUT_NAMES, OUTPUT_NAMES, Window
from loadtest.report import Curve, draw_engines, knee
from loadtest.sleeping_engine import write_repository

PROJECT = Path(__file__).resolve().parent.parent
_WARM_UP_S = 1.0


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    questions = PROJECT / "checkpoints" / "minilm-l6-squad" / "gate.json"
    parser.add_argument("--data", type=Path, default=questions, help="SQuAD file with the questions")
    parser.add_argument(
        "--repository", type=Path, nargs="*", default=[PROJECT / "model_repository"], help="with the engines to measure"
    )
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="one row for each number")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each number (default: %(default)s)")
    parser.add_argument(
        "--sleep-ms", type=float, default=40.0, help="of the sleeping engine; 0 leaves it out (default: %(default)s)"
    )
    parser.add_argument("--sleepers", type=int, default=4, help="instances of the sleeping engine (default: 4)")
    parser.add_argument(
        "--chart", type=Path, metavar="PNG", help="draw throughput and p99 of the repositories' engines"
    )
    parser.add_argument("--long", action="store_true", help="measure long texts too, with the sleeping engine")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Print the tables."""
    examples = [example for example in read_squad(args.data) if len(example.context) < 1200]
    random.Random(0).shuffle(examples)  # so that any run of them has all lengths
    uvloop.install()
    print(f"{date.today()}, {cpu_name()}, {psutil.cpu_count()} cores, {args.seconds:g} s a row")
    with ExitStack() as stack:
        products = [stack.enter_context(Product(root)) for root in args.repository]
        alone, served = asyncio.run(measure_clients(products, examples, args.clients, args.seconds))
    if args.chart:
        figure = draw_engines(alone, served, f"{products[0].bundle.manifest.name}, {psutil.cpu_count()} cores")
        figure.savefig(args.chart, dpi=110)
    if args.sleep_ms:
        with tempfile.TemporaryDirectory() as directory:
            root, source = Path(directory) / "repository", (args.repository or [PROJECT / "model_repository"])[0]
            write_repository(root, source=source, seconds=args.sleep_ms / 1000, instances=args.sleepers)
            with Product(root) as product:
                asyncio.run(measure_clients([product], examples, args.clients, args.seconds))
                if args.long:
                    asyncio.run(measure_long_texts(product, examples, args.seconds))


class Product:
    """The launcher, with the service and Triton, on free ports."""

    def __init__(self, repository: Path, **environment: str) -> None:
        self.repository = repository
        self._environment = {"BERTQA_DEADLINE_S": "60", **environment}
        self.bundle = Repository(repository).open()
        self._lines: list[str] = []

    def __enter__(self) -> "Product":
        self._process = subprocess.Popen(
            [sys.executable, "-m", "service", "--port=0", "--triton-grpc-port=0", f"--repository={self.repository}"],
            cwd=PROJECT, stderr=subprocess.PIPE, text=True, env=os.environ | self._environment,
        )  # fmt: skip
        try:
            address = urlsplit(self._find(r"ready at (http://\S+)"))
            self.host, self.port = str(address.hostname), int(address.port or 80)
            self.triton = re.findall(r"ready after .* \(gRPC (\S+)\)", "".join(self._lines))[-1]
            children = psutil.Process(self._process.pid).children(recursive=True)
            self.service = next(child for child in children if "uvicorn" in child.cmdline())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(60)

    def _find(self, pattern: str) -> str:
        """Wait for a line; the rest goes on to standard error."""
        stream = self._process.stderr
        assert stream
        for line in stream:
            self._lines.append(line)
            if match := re.search(pattern, line):
                threading.Thread(target=sys.stderr.writelines, args=(stream,), daemon=True).start()
                return match[1]
        raise RuntimeError("".join([*self._lines, f"the service ended with exit code {self._process.wait()}"]))

    @property
    def cpu_s(self) -> float:
        """User and system time of the service's process so far."""
        times = self.service.cpu_times()
        return float(times.user + times.system)


@dataclass
class Row:
    """What some clients saw."""

    clients: int
    seconds: float = 0.0
    cpu_s: float = 0.0  # of the service
    answered: list[float] = field(default_factory=list)  # seconds of each
    refused: list[float] = field(default_factory=list)
    stages: list[dict[str, float]] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Answers a second."""
        return len(self.answered) / self.seconds

    def ms(self, percent: float) -> float:
        """That percentile of the answers."""
        return 1000 * float(np.percentile(self.answered, percent))

    def stage(self, name: str) -> float:
        """Median milliseconds."""
        return statistics.median(each[name] for each in self.stages)


@dataclass(frozen=True)
class Reply:
    """What one request came to."""

    seconds: float
    stages: dict[str, float] = field(default_factory=dict)  # in ms, and the windows
    retry_after_s: float | None = None  # where it was refused


Ask = Callable[[], Awaitable[Reply]]
"""Asks one question."""


async def load(product: Product, clients: Sequence[Ask], seconds: float, *, patient: bool = True) -> Row:
    """Let every client ask again and again for a while; a patient one that is refused waits as long as it is told."""
    row = Row(len(clients))

    async def run(ask: Ask) -> None:
        while True:
            reply = await ask()
            if reply.retry_after_s is None:
                row.answered.append(reply.seconds)  # whichever row it is by now
                row.stages.append(reply.stages)
            else:
                row.refused.append(reply.seconds)
                if patient:
                    await asyncio.sleep(reply.retry_after_s * random.uniform(1, 1.5))

    tasks = [asyncio.ensure_future(run(ask)) for ask in clients]
    await asyncio.sleep(min(_WARM_UP_S, seconds))
    row, cpu_s, began = Row(len(clients)), product.cpu_s, time.perf_counter()
    await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    measured, row = row, Row(len(clients))  # what ends from now on is not counted
    measured.seconds, measured.cpu_s = time.perf_counter() - began, product.cpu_s - cpu_s
    for task in tasks:
        if task.done():
            task.result()  # raises
        task.cancel()
    await asyncio.wait(tasks)
    return measured


class RestClient:
    """One kept-alive connection; refuses a reply that is no answer."""

    def __init__(self, product: Product, bodies: Iterator[bytes]) -> None:
        self._product = product
        self._bodies = bodies
        self._stream: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def __call__(self) -> Reply:
        """Ask the next question."""
        body = next(self._bodies)
        began = time.perf_counter()
        status, headers, reply = await self.send(b"POST /v1/answer", body)
        took = time.perf_counter() - began
        if status == 503:
            return Reply(took, retry_after_s=float(headers["retry-after"]))
        value = json.loads(reply)
        if status != 200 or not value["answers"]:
            raise RuntimeError(f"status {status}: {reply[:200]!r}")
        return Reply(took, value["timings"] | {"windows": value["windows"]})

    async def send(self, target: bytes, body: bytes = b"") -> tuple[int, dict[str, str], bytes]:
        """Send a request and read its reply: status, headers, body."""
        if self._stream is None:
            self._stream = await asyncio.open_connection(self._product.host, self._product.port, limit=1 << 20)
        reader, writer = self._stream
        writer.write(
            b"%b HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
            % (target, len(body), body)
        )
        head, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines if line)
        return int(head.split()[1]), headers, await reader.readexactly(int(headers["content-length"]))


class EngineClient:
    """Sends prepared tensors straight to Triton."""

    def __init__(self, channel: grpc.aio.Channel, requests: Iterator[bytes]) -> None:
        method: Any = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer", None, service_pb2.ModelInferResponse.FromString
        )
        self._infer: Callable[[bytes], Awaitable[Any]] = method
        self._requests = requests

    async def __call__(self) -> Reply:
        """Send the next window."""
        request = next(self._requests)
        began = time.perf_counter()
        reply = await self._infer(request)
        took = time.perf_counter() - began
        if len(reply.raw_output_contents) != len(OUTPUT_NAMES):
            raise RuntimeError("the engine answered without tensors")
        return Reply(took)


def infer_request(window: Window) -> bytes:
    """The message that asks for a window."""
    message = service_pb2.ModelInferRequest(
        model_name=MODEL_NAME,
        inputs=[{"name": name, "datatype": "INT32", "shape": [1, window.length]} for name in INPUT_NAMES],
        outputs=[{"name": name} for name in OUTPUT_NAMES],
        raw_input_contents=[getattr(window, name).tobytes() for name in INPUT_NAMES],
    )
    return bytes(message.SerializeToString())


def body_of(example: Example) -> bytes:
    """The request that asks a question."""
    return json.dumps({"question": example.question, "context": example.context}).encode()


async def measure_clients(
    products: Sequence[Product], examples: Sequence[Example], numbers: Sequence[int], seconds: float
) -> list[dict[str, Curve]]:
    """Engine and REST side by side for each number of clients, then ten times the knee.

    Returns:
        The curves of the engines alone, and through REST.
    """
    loads = [Questions(product, examples) for product in products]
    engines: list[list[Row]] = [[] for _ in loads]
    rests: list[list[Row]] = [[] for _ in loads]
    for clients in numbers:
        for each, engine, rest in zip(loads, engines, rests, strict=True):
            engine.append(await each.load_engine(clients, seconds))
            rest.append(await load(each.product, each.askers(clients), seconds))
            what = f"batches of up to {each.batch}"
            print(f"{clients} clients, {what}: {engine[-1].rate:.1f}, {rest[-1].rate:.1f}/s", file=sys.stderr)
    for each, engine, rest in zip(loads, engines, rests, strict=True):
        print_clients(each, engine, rest)
        await measure_overload(each, engine, rest, seconds)
    names = ["batch 1" if each.batch == 1 else f"batches of up to {each.batch}" for each in loads]
    return [
        {name: {row.clients: (row.rate, row.ms(99)) for row in rows} for name, rows in zip(names, found, strict=True)}
        for found in (engines, rests)
    ]


class Questions:
    """Questions of one window, as a product is asked them over REST, and its engine alone over gRPC."""

    def __init__(self, product: Product, examples: Sequence[Example]) -> None:
        self.product = product
        self.batch = product.bundle.manifest.max_batch_size
        made = [product.bundle.maker(example.question, example.context).windows for example in examples]
        self._bodies = [body_of(each) for each, windows in zip(examples, made, strict=True) if len(windows) == 1]
        self._requests = [infer_request(windows[0]) for windows in made if len(windows) == 1]

    def askers(self, clients: int) -> list[Ask]:
        """So many clients of the service."""
        turns = itertools.cycle(self._bodies)
        return [RestClient(self.product, turns) for _ in range(clients)]

    async def load_engine(self, clients: int, seconds: float) -> Row:
        """Let so many clients ask the engine."""
        async with grpc.aio.insecure_channel(self.product.triton) as channel:
            client = EngineClient(channel, itertools.cycle(self._requests))
            return await load(self.product, [client] * clients, seconds)


def print_clients(questions: Questions, engines: Sequence[Row], rests: Sequence[Row]) -> None:
    """Print a row for each number of clients."""
    print(f"\n{questions.product.bundle.manifest.identity}, at most {questions.batch} windows in a call\n")
    print(
        "| clients | engine: calls/s | p50 ms | p99 ms | REST: answers/s | of the engine's | p50 ms | p99 ms | "
        "refused/s | service CPU ms | tokenize | infer | decode |\n" + "|---:" * 13 + "|"
    )
    for engine, rest in zip(engines, rests, strict=True):
        print(
            f"| {rest.clients} | {engine.rate:.1f} | {engine.ms(50):.1f} | {engine.ms(99):.1f} | {rest.rate:.1f} | "
            f"{rest.rate / engine.rate:.2f} | {rest.ms(50):.1f} | {rest.ms(99):.1f} | "
            f"{len(rest.refused) / rest.seconds:.1f} | {1000 * rest.cpu_s / len(rest.answered):.2f} | "
            f"{rest.stage('tokenize_ms'):.2f} | {rest.stage('infer_ms'):.1f} | {rest.stage('decode_ms'):.2f} |",
            flush=True,
        )


async def measure_overload(questions: Questions, engines: Sequence[Row], rests: Sequence[Row], seconds: float) -> None:
    """Ten times the clients of the knee; print what became of them and of the goals."""
    product = questions.product
    peak, engine_peak = max(row.rate for row in rests), max(row.rate for row in engines)
    at = knee({row.clients: row.rate for row in rests})
    there = next(row for row in rests if row.clients == at)
    over = await load(product, questions.askers(10 * at), 2 * seconds)
    rude = await load(product, questions.askers(10 * at), seconds, patient=False)
    each = there.cpu_s / len(there.answered)
    beside = 1e6 * (rude.cpu_s - each * len(rude.answered))
    refusal_us = f"at {beside / len(rude.refused):.0f} µs of CPU each" if rude.refused else ""
    print(
        f"\n- REST at its peak / engine at its peak: {peak:.1f} / {engine_peak:.1f} = {peak / engine_peak:.2f}\n"
        f"- p50 at {rests[0].clients} client(s), REST − engine: {rests[0].ms(50) - engines[0].ms(50):.1f} ms\n"
        f"- knee: {at} clients, {there.rate:.1f}/s, p99 {there.ms(99):.0f} ms\n"
        f"- {10 * at} clients: {over.rate:.1f}/s = {over.rate / peak:.2f} of the peak; p99 of the accepted "
        f"{over.ms(99):.0f} ms = {over.ms(99) / there.ms(99):.2f} of the knee's; "
        f"{len(over.refused) / over.seconds:.0f} refused/s, {_median_ms(over.refused)} ms each\n"
        f"- {10 * at} clients that come back at once: {rude.rate:.1f}/s = {rude.rate / peak:.2f} of the peak, p99 "
        f"{rude.ms(99):.0f} ms; {len(rude.refused) / rude.seconds:.0f} refused/s {refusal_us}",
        flush=True,
    )


def _median_ms(seconds: Sequence[float]) -> str:
    return f"{1000 * statistics.median(seconds):.1f}" if seconds else "none"


async def measure_long_texts(product: Product, examples: Sequence[Example], seconds: float) -> None:
    """Texts of rising length, and what a long one does to short questions beside it."""
    text = " ".join(dict.fromkeys(example.context for example in examples))
    print("\n| characters | windows | tokenize ms | infer ms | decode ms | total ms | ms a window | CPU ms a window |")
    print("|---:" * 8 + "|")
    for chars in (10_000, 25_000, 50_000, 100_000, 200_000):
        long = RestClient(product, itertools.repeat(long_body(text, chars)))
        row, cpu_s = Row(1), product.cpu_s
        for _ in range(3):
            row.stages.append((await long()).stages)
        cpu_ms = 1000 * (product.cpu_s - cpu_s) / 3
        windows, total = row.stage("windows"), row.stage("total_ms")
        print(
            f"| {chars:,} | {windows:.0f} | {row.stage('tokenize_ms'):.1f} | {row.stage('infer_ms'):.0f} | "
            f"{row.stage('decode_ms'):.1f} | {total:.0f} | {total / windows:.2f} | {cpu_ms / windows:.2f} |",
            flush=True,
        )
    print(
        "\n| beside a one-window client | its p50 ms | p99 ms | answers/s | longest hold of the event loop ms |\n"
        + "|---|---:|---:|---:|---:|"
    )
    bodies = itertools.cycle([body_of(example) for example in examples])
    for name, others in (("nobody", 0), ("one text of 100,000 characters, again and again", 1), ("four of them", 4)):
        with background(product, long_body(text, 100_000), others) as tasks:
            row = await load(product, [RestClient(product, bodies)], seconds)
            hold = await longest_hold(product, seconds)
            for task in tasks:
                if task.done():
                    task.result()
        print(f"| {name} | {row.ms(50):.1f} | {row.ms(99):.1f} | {row.rate:.1f} | {hold:.1f} |", flush=True)
    print(f"\nPeak memory of the service: {peak_mb(product.service.pid):.0f} MB")


def long_body(text: str, chars: int) -> bytes:
    """A question about so many characters of a text, repeated where it is too short."""
    repeated = (text + " ") * (1 + chars // len(text))
    return json.dumps({"question": "Who won the game?", "context": repeated[:chars]}).encode()


@contextmanager
def background(product: Product, body: bytes, clients: int) -> "Iterator[list[asyncio.Task[None]]]":
    """Clients that ask the same again and again meanwhile."""

    async def ask() -> None:
        client = RestClient(product, itertools.repeat(body))
        while True:
            await client()

    tasks = [asyncio.ensure_future(ask()) for _ in range(clients)]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()


async def longest_hold(product: Product, seconds: float) -> float:
    """The slowest of many looks at ``/health/live``, in milliseconds: how long the event loop did nothing else."""
    client, slowest, until = RestClient(product, iter(())), 0.0, time.perf_counter() + seconds
    while time.perf_counter() < until:
        began = time.perf_counter()
        await client.send(b"GET /health/live")
        slowest = max(slowest, time.perf_counter() - began)
        await asyncio.sleep(0.002)
    return 1000 * slowest


def peak_mb(pid: int) -> float:
    """Largest resident memory that a process has had."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 1000


if __name__ == "__main__":
    main(parse_args())
