"""Clients that ask without pause and know every correct answer in advance."""

import contextlib
import http.client
import itertools
import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.chaos.report import GRACE_S, Row, Size

DEADLINE_S = 3.0
"""BERTQA_DEADLINE_S of every service."""
HANG_S = 20.0
"""Seconds until a client gives up; by then the answer is far too late."""
REFUSALS = (429, 503, 504)

Answer = tuple[tuple[str, int, int], ...]
"""Text, start and end of each answer; empty means no answer."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A question, and the answer of every version without faults."""

    body: bytes
    truth: Mapping[int, Answer]  # by version


def questions() -> list[dict[str, Any]]:
    """Make question bodies with words that the tiny model knows; every eighth text has several windows."""
    who, where = ("Who wrote it?", "Who wrote the first program?", "Who was Ada?"), ("Where was it written?",)
    facts = (
        "Ada Lovelace wrote the first program in London.",
        "Horovod was made at Uber.",
        "It was written in London.",
    )
    found: list[dict[str, Any]] = []
    for question, order in itertools.product((*who, *where), itertools.permutations(facts, 2)):
        context = " ".join((*order, *facts)) if len(found) % 8 else " ".join(order * 8)
        found.append({"question": question, "context": context})
    return found


def answer_of(reply: Mapping[str, Any]) -> tuple[int, Answer]:
    """Return the version that answered, and its answer."""
    return reply["version"], tuple((each["text"], each["start"], each["end"]) for each in reply["answers"])


class Load:
    """Clients, each with its own thread and connection, and the row that they fill."""

    def __init__(
        self, row: Row, asked: Sequence[Asked], addresses: Sequence[tuple[str, int]], size: Size, *, pace_s: float = 0.0
    ) -> None:
        """Start asking.

        Args:
            row: receives the results.
            asked: the questions; each client cycles through them from its own starting point.
            addresses: host and port of each service; clients are spread over them.
            size: number of clients, and their patience.
            pace_s: minimum seconds between the starts of a client's requests.
        """
        self.row = row
        self._asked = asked
        self._limit_s = DEADLINE_S + GRACE_S * size.patience
        self._pace_s = pace_s
        self._done = threading.Event()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._ask, args=(number, *addresses[number % len(addresses)]), daemon=True)
            for number in range(size.clients)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Wait for the last answers."""
        self._done.set()
        for thread in self._threads:
            thread.join()

    def until(self, *, requests: int = 0, right: int = 0, seconds: float = 300.0) -> None:
        """Wait until there are at least the given total numbers of requests and correct answers.

        Raises:
            TimeoutError: it took too long.
        """
        end = time.monotonic() + seconds
        while self.row.requests < requests or self.row.right < right:
            if time.monotonic() > end:
                raise TimeoutError(f"{self.row.requests} requests, {self.row.right} right after {seconds:.0f} s")
            time.sleep(0.02)

    def _ask(self, number: int, host: str, port: int) -> None:
        connection = http.client.HTTPConnection(host, port, timeout=HANG_S)
        next_at = time.monotonic() + number / len(self._threads) * self._pace_s
        for asked in itertools.islice(itertools.cycle(self._asked), number * 7 % len(self._asked), None):
            if self._done.wait(max(next_at - time.monotonic(), 0)):
                break
            next_at = max(next_at + self._pace_s, time.monotonic())
            began = time.monotonic()
            try:
                connection.request("POST", "/v1/answer", asked.body, {"content-type": "application/json"})
                response = connection.getresponse()
                found = self._judged(asked, response, response.read())
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                found = "lost", repr(error)
            self._count(found, time.monotonic() - began)
        connection.close()

    @staticmethod
    def _judged(asked: Asked, response: http.client.HTTPResponse, body: bytes) -> tuple[str, str]:
        """Classify a reply as right, wrong, refused or lost, with a message."""
        shown = f"{response.status} {body[:300]!r}"
        try:
            reply = json.loads(body)
            if response.status == 200:
                version, answer = answer_of(reply)
                return "right" if asked.truth.get(version) == answer else "wrong", shown
            is_error = response.status in REFUSALS and reply.keys() == {"error", "error_type", "field"}
            if is_error and int(response.headers["retry-after"]) >= 1:
                return "refused", f"{response.status} {reply['error_type']}: {reply['error']}"
        except (ValueError, KeyError, TypeError):
            pass
        return "lost", shown

    def _count(self, found: tuple[str, str], seconds: float) -> None:
        kind, told = found
        if seconds > self._limit_s and kind != "lost":
            kind, told = "lost", f"after {seconds:.1f} s {told}"
        with self._lock:
            self.row.requests += 1
            self.row.slowest_s = max(self.row.slowest_s, seconds)
            if kind == "refused":
                refused, _, message = told.partition(": ")
                self.row.refused[refused] += 1
                self.row.refusal = message
                return
            setattr(self.row, kind, getattr(self.row, kind) + 1)
            if kind != "right" and len(self.row.problems) < 5:
                self.row.problems.append(f"{kind}: {told}")


@contextlib.contextmanager
def load(
    row: Row, asked: Sequence[Asked], addresses: Sequence[tuple[str, int]], size: Size, *, pace_s: float = 0.0
) -> Iterator[Load]:
    """Run a `Load` during a block."""
    clients = Load(row, asked, addresses, size, pace_s=pace_s)
    try:
        yield clients
    finally:
        clients.stop()
