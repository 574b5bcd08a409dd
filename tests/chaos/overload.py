"""Long overload, and clients that behave badly."""

import dataclasses
import itertools
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from tests.chaos.clients import load
from tests.chaos.faults import PLAIN, Scenario
from tests.chaos.product import Layout, Product
from tests.chaos.report import Row, Size

SLEEP_S = 0.1
"""Seconds per engine call, so that the engine is the bottleneck and not this machine."""
FACTOR = 3
CLIENTS = 96
"""Number of clients; enough are asking even while others wait."""
GROWTH_MIB = 8.0
"""Memory growth allowed to a service in the second half of an overload; covers noise, but not a leak."""
IDLE = 200
"""Idle connections per service, and as many with an unfinished request."""


class Memory:
    """Resident memory of the services' processes, sampled during a block."""

    def __init__(self, product: Product) -> None:
        self._files = [Path(f"/proc/{service.worker}/statm") for service in product.services]
        self._samples: list[tuple[float, list[float]]] = []

    @contextmanager
    def watched(self) -> Iterator["Memory"]:
        """Take a sample each second."""
        done = threading.Event()

        def watch() -> None:
            page_mib = os.sysconf("SC_PAGE_SIZE") / 2**20
            while not done.wait(1):
                resident = [int(file.read_text().split()[1]) * page_mib for file in self._files]
                self._samples.append((time.monotonic(), resident))

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield self
        finally:
            done.set()
            thread.join()

    def growth(self) -> tuple[float, float]:
        """Fit a line to the second half; return the largest growth of a service in MiB per hour and in total MiB."""
        half = self._samples[len(self._samples) // 2 :]
        seconds = np.array([at for at, _ in half])
        slopes = np.polyfit(seconds - seconds[0], np.array([resident for _, resident in half]), 1)[0]
        steepest = float(slopes.max())
        return steepest * 3600, steepest * float(seconds[-1] - seconds[0])

    def last(self) -> float:
        """Return the memory of the largest service at the end, in MiB."""
        return max(self._samples[-1][1])


def overload(product: Product, size: Size) -> Row:
    """Send three times the engine's capacity at a fixed rate; the excess must be refused and nothing may pile up."""
    row = Row(fault="overload")
    with product.watched(row, size), product.faults.on("slow", seconds=SLEEP_S):
        few = Row(fault="capacity")
        began = time.monotonic()
        with load(few, product.asked, product.addresses, dataclasses.replace(size, clients=8)) as clients:
            clients.until(right=100)
        capacity = few.right / (time.monotonic() - began)
        many = dataclasses.replace(size, clients=CLIENTS)
        pace_s = CLIENTS / (FACTOR * capacity)
        began, tokenized = time.monotonic(), _tokenized(product)
        with (
            Memory(product).watched() as memory,
            load(row, product.asked, product.addresses, many, pace_s=pace_s) as clients,
        ):
            time.sleep(size.soak_minutes * 60)
            clients.until(requests=size.requests, seconds=3600)
        seconds = time.monotonic() - began
        tokenized = _tokenized(product) - tokenized
    row.injected = row.requests
    per_hour, growth = memory.growth()
    row.fault = (
        f"overload: {row.requests / seconds:.0f}/s at a capacity of {capacity:.0f}/s for {seconds / 60:.1f} min; "
        f"{row.right / seconds:.0f}/s answered; memory {memory.last():.0f} MiB, {per_hour:+.1f} MiB/h"
    )
    if not row.refused:
        row.problems.append("nothing was refused")
    if growth > GROWTH_MIB:
        row.problems.append(f"memory grew by {growth:.1f} MiB in the second half")
    if tokenized > 1.2 * row.right + CLIENTS:
        row.problems.append(f"{tokenized:.0f} questions were tokenized, but only {row.right} answered")
    return row


def _tokenized(product: Product) -> float:
    return sum(service.metric('bertqa_seconds_count{stage="tokenize"}') for service in product.services)


def idle_and_aborted(product: Product, size: Size) -> Row:
    """Open idle and unfinished connections, and abort uploads, next to well-behaved clients."""
    row = Row(fault="idle connections, unfinished and aborted requests")
    begun = b"POST /v1/answer HTTP/1.1\r\nhost: chaos\r\ncontent-type: application/json\r\n"
    done = threading.Event()

    def abort() -> None:
        """Abort repeatedly: after half of a body, or after a whole question without waiting for its answer."""
        (question, *_), addresses = product.asked, itertools.cycle(product.addresses)
        while not done.wait(0.02):
            with socket.create_connection(next(addresses), 10) as connection:
                length = len(question.body) * random.choice((1, 1000))
                connection.sendall(begun + f"content-length: {length}\r\n\r\n".encode() + question.body)
                # closed by a reset
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                row.injected += 1

    thread = threading.Thread(target=abort)
    with product.watched(row, size), ExitStack() as stack:
        for address, number in itertools.product(product.addresses, range(2 * IDLE)):
            connection = stack.enter_context(socket.create_connection(address, 10))
            connection.sendall(begun if number % 2 else b"")
            row.injected += 1
        with load(row, product.asked, product.addresses, size) as clients:
            thread.start()
            try:
                clients.until(requests=size.requests)
            finally:
                done.set()
                thread.join()
    if row.refused:
        row.problems.append(f"refused: {row.refusal}")
    return row


SCENARIOS: tuple[tuple[Layout, Scenario], ...] = ((PLAIN, idle_and_aborted), (Layout(), overload))
