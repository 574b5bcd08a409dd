"""What the service adds to its engine: throughput and latency against clients, overload, and long texts.

Starts the product twice: with the engine of the repository, and with one that sleeps a fixed time, so that cores are
not the limit. Closed-loop clients post real one-window questions over REST and, in turns with that, send the tensors of
the same questions to Triton over gRPC. The service's CPU time is the clock of its process; the clients run here and are
not counted. Several repositories are measured in turns at each number of clients, and drawn on the same axes.
"""

if __name__ == "__main__":  # before the imports, because --help needs none of them
    from bertqa.cli.command import run
    from loadtest.commands import service_app

    run(service_app, "python -m loadtest.measure_service")

import asyncio
import itertools
import json
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import psutil
import uvloop
from tritonclient.grpc import service_pb2

from bertqa.hardware import cpu_name
from bertqa.manifest import MODEL_NAME
from bertqa.squad import Example, read_squad
from bertqa.windows import INPUT_NAMES, OUTPUT_NAMES, Window
from loadtest.closed_loop import Load, Reply, closed_loop, for_requests, for_seconds, http_get, http_post
from loadtest.commands import ServiceOptions
from loadtest.figures import Curve, draw_engines
from loadtest.points import knee
from loadtest.servers import PROJECT, Product
from loadtest.sleeping_engine import write_repository
from loadtest.tables import heading, row

_WARM_UP_S = 1.0


def main(options: ServiceOptions) -> None:
    """Print the tables."""
    examples = [example for example in read_squad(options.data) if len(example.context) < 1200]
    random.Random(0).shuffle(examples)  # so that any run of them has all lengths
    uvloop.install()
    print(f"{date.today()}, {cpu_name()}, {psutil.cpu_count()} cores, {options.seconds:g} s a row")
    if options.repositories:
        with ExitStack() as stack:
            products = [stack.enter_context(Product(root)) for root in options.repositories]
            alone, served = asyncio.run(measure_clients(products, examples, options.clients, options.seconds))
        if options.chart:
            figure = draw_engines(alone, served, f"{products[0].bundle.manifest.name}, {psutil.cpu_count()} cores")
            figure.savefig(options.chart, dpi=110)
    if options.sleep_ms:
        with tempfile.TemporaryDirectory() as directory:
            root, source = Path(directory) / "repository", (*options.repositories, PROJECT / "model_repository")[0]
            write_repository(root, source=source, seconds=options.sleep_ms / 1000, instances=options.sleepers)
            with Product(root) as product:
                asyncio.run(measure_clients([product], examples, options.clients, options.seconds))
                if options.long:
                    asyncio.run(measure_long_texts(product, examples, options.seconds))


@dataclass(frozen=True)
class Row:
    """What some clients saw. What ended after ``seconds`` counts for the CPU time alone."""

    clients: int
    seconds: float
    load: Load
    cpu_s: float  # of the service, for all of the load

    @cached_property
    def answered(self) -> list[float]:
        """Seconds of each answer, without earlier attempts that were refused."""
        return [each.attempt_s for each in self._counted if each.status == 200]

    @cached_property
    def refused(self) -> list[float]:
        """Seconds of each refusal that was not tried again."""
        return [each.attempt_s for each in self._counted if each.status == 503]

    @property
    def refusals(self) -> int:
        """Attempts that were refused, tried again or not."""
        return len(self.refused) + sum(each.shed for each in self._counted)

    @property
    def rate(self) -> float:
        """Answers per second."""
        return len(self.answered) / self.seconds

    @property
    def cpu_ms(self) -> float:
        """CPU time of the service per answer."""
        return 1000 * self.cpu_s / sum(each.status == 200 for each in self.load.replies)

    def ms(self, percent: float) -> float:
        """A percentile of the answers."""
        return 1000 * float(np.percentile(self.answered, percent))

    def stage(self, name: str) -> float:
        """Median of a field of the replies' ``timings``, in milliseconds, or of their ``windows``."""
        return statistics.median(each[name] for each in self._stages)

    @property
    def _counted(self) -> list[Reply]:
        return [each for each in self.load.replies if each.ended_s <= self.seconds]

    @cached_property
    def _stages(self) -> list[dict[str, float]]:
        values = [json.loads(each.body) for each in self._counted if each.status == 200]
        return [value["timings"] | {"windows": value["windows"]} for value in values]


Requests = Iterator[tuple[int, bytes]]


async def load_rest(product: Product, requests: Requests, clients: int, seconds: float, *, retries: bool = True) -> Row:
    """Let clients post questions for a while, after a warm-up.

    Args:
        product: to ask.
        requests: as for `closed_loop`.
        clients: number of connections.
        seconds: to measure.
        retries: if not, a refused client asks its next question at once.

    Raises:
        RuntimeError: a reply is neither an answer nor a refusal.
    """
    address = product.host, product.port
    await closed_loop(*address, requests, clients, until=for_seconds(min(_WARM_UP_S, seconds)), retries=retries)
    cpu_s = product.cpu_s
    load = await closed_loop(*address, requests, clients, until=for_seconds(seconds), retries=retries)
    found = Row(clients, seconds, load, product.cpu_s - cpu_s)
    check(load)
    return found


def check(load: Load) -> None:
    """Return if every reply is an answer or a refusal.

    Raises:
        RuntimeError: one is not; the message quotes it.
    """
    for reply in load.replies:
        if reply.status != 503 and (reply.status != 200 or not json.loads(reply.body)["answers"]):
            raise RuntimeError(f"status {reply.status}: {reply.body[:200]!r}")


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


def post(product: Product, body: bytes) -> bytes:
    """The bytes of a question over HTTP."""
    return http_post(product.host, product.port, "/v1/answer", body)


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
            rest.append(await load_rest(each.product, each.posts, clients, seconds))
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
    """One-window questions, to ask a product over REST and its engine alone over gRPC."""

    def __init__(self, product: Product, examples: Sequence[Example]) -> None:
        self.product = product
        self.batch = product.bundle.manifest.max_batch_size
        made = [product.bundle.tokenizer(example.question, example.context).windows for example in examples]
        posts = [
            post(product, body_of(each)) for each, windows in zip(examples, made, strict=True) if len(windows) == 1
        ]
        self.posts: Requests = enumerate(itertools.cycle(posts))
        self._requests = itertools.cycle([infer_request(windows[0]) for windows in made if len(windows) == 1])

    async def load_engine(self, clients: int, seconds: float) -> Row:
        """Let clients send prepared tensors straight to Triton."""
        async with grpc.aio.insecure_channel(self.product.triton) as channel:
            method: Any = channel.unary_unary(
                "/inference.GRPCInferenceService/ModelInfer", None, service_pb2.ModelInferResponse.FromString
            )
            load = Load()

            async def client(began: float, until: float) -> None:
                while (sent := time.perf_counter()) < until:
                    reply = await method(next(self._requests))
                    if len(reply.raw_output_contents) != len(OUTPUT_NAMES):
                        raise RuntimeError("the engine answered without tensors")
                    ended = time.perf_counter()
                    load.replies.append(Reply(0, ended - sent, 200, b"", 0, ended - sent, ended - began))

            for length in (min(_WARM_UP_S, seconds), seconds):
                load.replies.clear()
                began = time.perf_counter()
                await asyncio.gather(*(client(began, began + length) for _ in range(clients)))
        return Row(clients, seconds, load, 0.0)


def print_clients(questions: Questions, engines: Sequence[Row], rests: Sequence[Row]) -> None:
    """Print a row for each number of clients."""
    print(f"\n{questions.product.bundle.manifest.identity}, at most {questions.batch} windows in a call\n")
    names = "clients", "engine: calls/s", "p50 ms", "p99 ms", "REST: answers/s", "of the engine's", "p50 ms", "p99 ms"
    print(heading([*names, "refused/s", "service CPU ms", "tokenize", "infer", "decode"], texts=0))
    for engine, rest in zip(engines, rests, strict=True):
        cells = [rest.clients, f"{engine.rate:.1f}", f"{engine.ms(50):.1f}", f"{engine.ms(99):.1f}"]
        cells += [f"{rest.rate:.1f}", f"{rest.rate / engine.rate:.2f}", f"{rest.ms(50):.1f}", f"{rest.ms(99):.1f}"]
        cells += [f"{rest.refusals / rest.seconds:.1f}", f"{rest.cpu_ms:.2f}"]
        cells += [f"{rest.stage('tokenize_ms'):.2f}", f"{rest.stage('infer_ms'):.1f}"]
        print(row([*cells, f"{rest.stage('decode_ms'):.2f}"]), flush=True)


async def measure_overload(questions: Questions, engines: Sequence[Row], rests: Sequence[Row], seconds: float) -> None:
    """Ask with ten times the clients of the knee; print what they got, and how far the goals are met."""
    product = questions.product
    peak, engine_peak = max(each.rate for each in rests), max(each.rate for each in engines)
    at = knee({each.clients: each.rate for each in rests})
    there = next(each for each in rests if each.clients == at)
    over = await load_rest(product, questions.posts, 10 * at, 2 * seconds)
    rude = await load_rest(product, questions.posts, 10 * at, seconds, retries=False)
    answers = sum(reply.status == 200 for reply in rude.load.replies)
    refusals = len(rude.load.replies) - answers
    beside_us = 1e6 * (rude.cpu_s - there.cpu_ms / 1000 * answers)
    refusal = f"at {beside_us / refusals:.0f} µs of CPU and {_median_ms(rude.refused)} ms each" if refusals else ""
    print(
        f"\n- REST at its peak / engine at its peak: {peak:.1f} / {engine_peak:.1f} = {peak / engine_peak:.2f}\n"
        f"- p50 at {rests[0].clients} client(s), REST − engine: {rests[0].ms(50) - engines[0].ms(50):.1f} ms\n"
        f"- knee: {at} clients, {there.rate:.1f}/s, p99 {there.ms(99):.0f} ms\n"
        f"- {10 * at} clients: {over.rate:.1f}/s = {over.rate / peak:.2f} of the peak; p99 of the accepted "
        f"{over.ms(99):.0f} ms = {over.ms(99) / there.ms(99):.2f} of the knee's; "
        f"{over.refusals / over.seconds:.0f} refused/s\n"
        f"- {10 * at} clients that come back at once: {rude.rate:.1f}/s = {rude.rate / peak:.2f} of the peak, p99 "
        f"{rude.ms(99):.0f} ms; {rude.refusals / rude.seconds:.0f} refused/s {refusal}",
        flush=True,
    )


def _median_ms(seconds: Sequence[float]) -> str:
    return f"{1000 * statistics.median(seconds):.1f}" if seconds else "none"


async def measure_long_texts(product: Product, examples: Sequence[Example], seconds: float) -> None:
    """Measure texts of rising length, and what a long one does to short questions at the same time."""
    text = " ".join(dict.fromkeys(example.context for example in examples))
    print()
    stages = [f"{name} ms" for name in ("tokenize", "infer", "decode", "total")]
    print(heading(["characters", "windows", *stages, "ms a window", "CPU ms a window"], texts=0))
    for chars in (10_000, 25_000, 50_000, 100_000, 200_000):
        request, cpu_s = (0, post(product, long_body(text, chars))), product.cpu_s
        load = await closed_loop(product.host, product.port, itertools.repeat(request), 1, until=for_requests(3))
        check(load)
        found = Row(1, load.seconds, load, product.cpu_s - cpu_s)
        windows, total = found.stage("windows"), found.stage("total_ms")
        cells = [f"{chars:,}", f"{windows:.0f}", f"{found.stage('tokenize_ms'):.1f}", f"{found.stage('infer_ms'):.0f}"]
        cells += [f"{found.stage('decode_ms'):.1f}", f"{total:.0f}", f"{total / windows:.2f}"]
        print(row([*cells, f"{found.cpu_ms / windows:.2f}"]), flush=True)
    print()
    names = "beside a one-window client", "its p50 ms", "p99 ms", "answers/s", "longest hold of the event loop ms"
    print(heading(names))
    bodies = enumerate(itertools.cycle([post(product, body_of(example)) for example in examples]))
    for name, others in (("nobody", 0), ("one text of 100,000 characters, again and again", 1), ("four of them", 4)):
        async with background(product, long_body(text, 100_000), others):
            found = await load_rest(product, bodies, 1, seconds)
            hold = await longest_hold(product, seconds)
        print(row([name, f"{found.ms(50):.1f}", f"{found.ms(99):.1f}", f"{found.rate:.1f}", f"{hold:.1f}"]), flush=True)
    print(f"\nPeak memory of the service: {peak_mb(product.service.pid):.0f} MB")


def long_body(text: str, chars: int) -> bytes:
    """A question about the first characters of a text, repeated if it is too short."""
    repeated = (text + " ") * (1 + chars // len(text))
    return json.dumps({"question": "Who won the game?", "context": repeated[:chars]}).encode()


@asynccontextmanager
async def background(product: Product, body: bytes, clients: int) -> AsyncIterator[None]:
    """Clients that ask the same question again and again meanwhile."""
    is_over = False
    requests = itertools.repeat((0, post(product, body)))
    load = asyncio.ensure_future(closed_loop(product.host, product.port, requests, clients, until=lambda _: is_over))
    try:
        yield
    finally:
        is_over = True
        found = await load
    check(found)


async def longest_hold(product: Product, seconds: float) -> float:
    """The slowest of many requests to ``/health/live``, in milliseconds: how long the event loop did nothing else."""
    looks = itertools.repeat((0, http_get(product.host, product.port, "/health/live")))
    load = await closed_loop(product.host, product.port, looks, 1, until=for_seconds(seconds), pace_s=0.002)
    return 1000 * max(reply.attempt_s for reply in load.replies)


def peak_mb(pid: int) -> float:
    """Largest resident memory that a process has had."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 1000
