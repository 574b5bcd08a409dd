"""Requests that once held the service up, locked users out or filled its memory, each against a running server.

The server is a process of its own behind a real socket, with API keys and the cache, the shipped tokenizer, and an
engine that computes nothing, or sleeps. What needs Triton or HAProxy is among `SCENARIOS`. A row for each fault; bounds
that depend on the machine are stretched by `Size.patience`.
"""

import asyncio
import contextlib
import http.client
import itertools
import json
import socket
import statistics
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from loadtest.measure_admission import CLIENTS, CROWD, TOGETHER, Admission, Outcome
from service.api_keys import new_key
from tests.chaos.clients import questions as known_questions
from tests.chaos.faults import Scenario
from tests.chaos.product import HOST, Layout, Product
from tests.chaos.pulse import Pulse, memory_mib
from tests.chaos.replicas import BALANCED
from tests.chaos.report import Row, Size
from tests.chaos.search import HOLD_S, LATE_S, MEMORY_MIB, REPLY_BYTES
from tests.chaos.toy_service import INSTANCES, toy_service
from tests.chaos.wire import Address, Reply, exchange, get, question, read_reply, request

ASKED = {"question": "Who made it?", "context": "It was made at Uber in London."}
LARGE = {"question": "who", "context": (" " * 14_000).join("abcdefghijklmn"), "top_k": 100}
"""Of 14 tokens, and with answers of as many characters as there are in all."""
HANGUL = {"question": "who", "context": "각" * 200_000}
SOON_S = 2.0
"""Seconds within which something small is answered, whatever else is asked."""
DEAD_S = 2.0
"""Seconds within which a deleted key is one no more."""
ARRIVAL_S = 3.0
CALL_S = 0.05
REFUSED = {422, 503, 504}


class Server:
    """A service whose clients need a key, and what is known of its process."""

    def __init__(self, address: Address, process: int, keys: Path, pulse: Pulse, idle: Pulse) -> None:
        self.address, self.process, self.keys, self._pulse, self._idle = address, process, keys, pulse, idle
        self.key = new_key(keys, "whoever", None, None)
        end = time.monotonic() + 30
        while self.ask(ASKED).status != 200:
            assert time.monotonic() < end, "the key is not taken"
            time.sleep(0.05)

    @property
    def headers(self) -> dict[str, str]:
        """With the key that stays."""
        return {"x-api-key": self.key}

    def sent(
        self,
        body: object,
        timeout_ms: int = 10_000,
        target: str = "/v1/answer",
        headers: Mapping[str, str] | None = None,
    ) -> bytes:
        """A request with the key."""
        return question(body, {**self.headers, "x-timeout-ms": str(timeout_ms), **(headers or {})}, target)

    def ask(self, body: object, timeout_ms: int = 10_000, target: str = "/v1/answer") -> Reply:
        """Ask, and wait for the reply."""
        return exchange(self.address, self.sent(body, timeout_ms, target))

    @contextlib.contextmanager
    def unheld(self, row: Row, size: Size) -> Iterator[None]:
        """See that the event loop is held no longer than it may be, as long as a block lasts."""
        self._pulse.begin()
        self._idle.begin()
        yield
        bound, noise = HOLD_S * size.patience, self._idle.longest()
        hold = self._pulse.longest()
        row.notes.append(
            f"{row.fault}: event loop held for {hold * 1000:.0f} ms, an idle one for {noise * 1000:.0f} ms"
        )
        if hold > bound + noise:
            row.over += 1
            row.problems.append(f"event loop held for {hold:.3f} s; at most {bound + noise:.3f} s here")


def judge(row: Row, reply: Reply, *, within_s: float, allowed: set[int] | None = None) -> Reply:
    """Count a reply, which has to be of an allowed status, 200 if none is named, and in time."""
    row.requests += 1
    row.slowest_s = max(row.slowest_s, reply.seconds)
    if reply.status == 200:
        row.right += 1
    if reply.status == 0:
        row.hung += 1
    elif reply.status not in (allowed or {200}):
        row.lost += 1
    elif reply.status != 200:
        row.refused[str(reply.status)] += 1
    if reply.seconds > within_s:
        row.over += 1
    if (reply.status not in (allowed or {200}) or reply.seconds > within_s) and len(row.problems) < 5:
        row.problems.append(f"{reply}; it had {within_s:.1f} s")
    return reply


# ---- little that takes long ----------------------------------------------------------------------------------------

SMALL: Mapping[str, str] = {
    "graphemes": "\u203c\u200d" * 200,
    "words of 100 letters": " ".join(["a" * 100] * 13),
    "words of 1,000 letters": " ".join(["b" * 1000] * 3),
    "12 KB of graphemes": "\u203c\u200d" * 2_000,
    "flags": "\U0001f1e6" * 2_000,
}


def small_and_slow(server: Server, size: Size) -> Row:
    row = Row(fault="1: a few KB whose spans widen to few answers")
    for text in SMALL.values():
        row.injected += 1
        asked = {"question": "who", "context": text, "top_k": 2, "max_answer_tokens": 200}
        with server.unheld(row, size):
            judge(row, server.ask(asked, 1000), within_s=1 + LATE_S * size.patience)
    return row


def full_pools(server: Server, size: Size) -> Row:
    """Long requests whose clients leave, again and again; everybody else, and who keeps the keys, goes on."""
    row = Row(fault="2: threads full of texts whose clients have left")
    goes = new_key(server.keys, "goes", None, None)
    long = [
        server.sent(HANGUL),
        server.sent({**LARGE, "context": SMALL["12 KB of graphemes"], "max_answer_tokens": 200}),
    ]
    done = threading.Event()

    def leave() -> None:
        for sent in itertools.cycle(long):
            if done.is_set():
                return
            exchange(server.address, sent, timeout=0.2)
            row.injected += 1

    def knows() -> bool:
        return get(server.address, "/info", {"x-api-key": goes}).status == 200

    began = time.monotonic()
    while not knows():
        assert time.monotonic() - began < 30, "a new key is not taken"
        time.sleep(0.05)
    with server.unheld(row, size), ThreadPoolExecutor(6) as crowd:
        for _ in range(6):
            crowd.submit(leave)
        try:
            time.sleep(0.5)
            for _ in range(3):
                for path in ("/metrics", "/health/live", "/health/ready"):
                    judge(row, get(server.address, path), within_s=SOON_S * size.patience)
                judge(row, server.ask(ASKED), within_s=SOON_S * size.patience)
            lines = server.keys.read_text().splitlines(keepends=True)
            server.keys.write_text("".join(line for line in lines if not line.startswith("goes ")))
            began = time.monotonic()
            while knows():
                if time.monotonic() - began > DEAD_S * size.patience:
                    row.over += 1
                    row.problems.append(f"a deleted key was one {DEAD_S * size.patience:.0f} s later")
                    break
                time.sleep(0.05)
            row.notes.append(f"{row.fault}: a deleted key was dead after {time.monotonic() - began:.2f} s")
        finally:
            done.set()
    long_asked = {**ASKED, "context": ASKED["context"] + " x" * 20_000}
    judge(row, server.ask(long_asked), within_s=10 + LATE_S * size.patience)
    return row


def long_texts(server: Server, size: Size) -> Row:
    row = Row(fault="3: 200,000 Hangul characters within a second")
    for _ in range(3):
        row.injected += 1
        with server.unheld(row, size):
            judge(row, server.ask(HANGUL, 1000), within_s=1 + LATE_S * size.patience, allowed={200, *REFUSED})
    judge(row, server.ask(ASKED), within_s=SOON_S * size.patience)
    return row


def hammered_readiness(server: Server, size: Size) -> Row:
    """A probe must not wait for the engine behind others: it takes about as long as one that says nothing of it."""
    row = Row(fault="4: /health/ready asked by 29 strangers without pause, /health/live by one")
    done = threading.Event()
    seconds: dict[str, list[float]] = {"/health/ready": [], "/health/live": []}

    def hammer(path: str) -> None:
        connection = http.client.HTTPConnection(*server.address, timeout=30)
        while not done.is_set():
            began = time.monotonic()
            connection.request("GET", path)
            response = connection.getresponse()
            response.read()
            seconds[path].append(time.monotonic() - began)
            if response.status != 200:
                row.problems.append(f"{path}: {response.status}")
                break
        connection.close()

    with ThreadPoolExecutor(30) as crowd:
        for number in range(30):
            crowd.submit(hammer, "/health/ready" if number else "/health/live")
        try:
            for number in range(min(size.requests // 10, 100)):
                asked = {**ASKED, "context": f"{number} of them"}  # new to the cache
                judge(row, server.ask(asked), within_s=SOON_S * size.patience)
        finally:
            done.set()
    row.injected = sum(map(len, seconds.values()))
    ready, live = (statistics.median(each) for each in seconds.values())
    row.notes.append(f"{row.fault}: half of them after {ready * 1000:.0f} ms and {live * 1000:.0f} ms")
    if ready > 3 * live + CALL_S:
        row.over += 1
        row.problems.append(f"half of the probes took {ready:.2f} s and more; half of /health/live {live:.2f} s")
    return row


# ---- HTTP ----------------------------------------------------------------------------------------------------------


def upgrades(server: Server, size: Size) -> Row:
    row = Row(fault="5: Upgrade, as Java's client and curl --http2 send it; the body with it, or after it")
    offer = {"connection": "Upgrade, HTTP2-Settings", "upgrade": "h2c", "http2-settings": "AAMAAABkAAQCAAAAAAIAAAAA"}
    whole = server.sent(ASKED, headers=offer)
    head = whole.index(b"\r\n\r\n") + 4
    for cut in (len(whole), head, head + 5, head - 1, 20):
        row.injected += 1
        began = time.monotonic()
        with socket.create_connection(server.address, 30) as connection:
            connection.sendall(whole[:cut])
            time.sleep(0.1)
            connection.sendall(whole[cut:])
            try:
                reply = read_reply(connection, began)
            except (OSError, http.client.HTTPException) as error:
                reply = Reply(0, body=repr(error).encode(), seconds=time.monotonic() - began)
        judge(row, reply, within_s=SOON_S * size.patience)
    return row


def odd_frames(server: Server, size: Size) -> Row:
    row = Row(fault="9: Host none or twice, codings beside chunked, chunks in HTTP/1.0, more than 16 in a row")
    body = json.dumps(ASKED).encode()
    chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    common = f"content-type: application/json\r\nx-api-key: {server.key}\r\n".encode()
    length = b"content-length: %d\r\n\r\n%b" % (len(body), body)
    line, host = b"POST /v1/answer HTTP/1.1\r\n", b"host: chaos\r\n"
    for sent in (
        line + common + length,
        line + 2 * host + common + length,
        line + host + common + b"transfer-encoding: gzip, chunked\r\n\r\n" + chunks,
        line + host + common + b"transfer-encoding: chunked, chunked\r\n\r\n" + chunks,
        line + host + common + b"transfer-encoding: chunked\r\n" + length,
        line.replace(b"1.1", b"1.0") + host + common + b"transfer-encoding: chunked\r\n\r\n" + chunks,
    ):
        row.injected += 1
        judge(row, exchange(server.address, sent), within_s=SOON_S * size.patience, allowed={400})
    row.injected += 1
    whole = request("POST", "/v1/answer", body, {"x-api-key": server.key, "connection": "keep-alive"})
    with socket.create_connection(server.address, 30) as connection, contextlib.suppress(ConnectionResetError):
        connection.sendall(whole * 40)
        while read := connection.recv(1 << 20):
            row.notes = [(row.notes or [""])[0] + read.decode()]
    statuses = [text[:3] for text in "".join(row.notes).split("HTTP/1.1 ")[1:]]
    row.notes = []
    row.requests += len(statuses)
    row.right += statuses.count("200")
    if statuses[-1:] != ["400"]:
        row.lost += 1
        row.problems.append(f"40 requests in a row: {statuses}")
    return row


# ---- memory --------------------------------------------------------------------------------------------------------


def unread_replies(server: Server, size: Size) -> Row:
    """Clients that do not read what they have asked for, and some that read drop by drop; others go on."""
    row = Row(fault="6: large replies, which 8 clients do not take and 2 take slowly")
    sent = server.sent(
        {"questions": [{**LARGE, "question": f"who {number}"} for number in range(9)]}, target="/v1/answers"
    )
    bound = (10 + ARRIVAL_S) * size.patience
    reply = judge(
        row, exchange(server.address, sent), within_s=10 + LATE_S * size.patience, allowed={200, 413, 503, 504}
    )
    if len(reply.body) > REPLY_BYTES:
        row.over += 1
        row.problems.append(f"{len(reply.body):,} bytes of reply to {len(sent):,}")
    with ExitStack() as stack:
        connections = []
        for _ in range(10):
            row.injected += 1
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.settimeout(bound)
            connection.connect(server.address)
            connection.sendall(sent)
            connections.append(connection)
        end = time.monotonic() + ARRIVAL_S
        while time.monotonic() < end:
            for connection in connections[:2]:
                with contextlib.suppress(BlockingIOError, ConnectionResetError):
                    connection.recv(64, socket.MSG_DONTWAIT)
            time.sleep(0.1)
            judge(row, server.ask(ASKED), within_s=SOON_S * size.patience, allowed={200, 503})
        for connection in connections:  # each ends, or has been ended
            with contextlib.suppress(ConnectionResetError):
                while connection.recv(1 << 20):
                    pass
    until_s = time.monotonic() + bound
    while (reply := server.ask(ASKED)).status != 200 and time.monotonic() < until_s:
        time.sleep(0.1)
    judge(row, reply, within_s=SOON_S * size.patience)
    return _bounded(row, server)


def cached_answers(server: Server, size: Size) -> Row:
    row = Row(fault="6: large answers that the cache is to keep")
    for number in range(40):
        row.injected += 1
        asked = {**LARGE, "context": f"{LARGE['context']}{number}"}
        judge(row, server.ask(asked), within_s=10 + LATE_S * size.patience)
    return _bounded(row, server)


def _bounded(row: Row, server: Server) -> Row:
    peak = memory_mib(server.process, "VmHWM")
    row.notes.append(f"{row.fault}: memory came to {peak:.0f} MiB")
    if peak > MEMORY_MIB:
        row.over += 1
        row.problems.append(f"memory came to {peak:.0f} MiB; at most {MEMORY_MIB}")
    return row


def many_values(server: Server, size: Size) -> Row:
    """Structure, windows and questions at their limits."""
    row = Row(fault="8, 9: 2 MiB of {}, more windows than allowed, many questions")
    sent = request("POST", "/v1/answer", b"[" + b"{}," * 699_000 + b"{}]", server.headers)
    windows = {"question": "who", "context": "가 " * 60_000, "overlap": 40}
    several = {"questions": [{**ASKED, "question": f"Who {number}?"} for number in range(TOGETHER)]}
    too_many = {"questions": [*several["questions"], ASKED]}
    for asked, statuses in (
        (sent, {400}),
        (server.sent(windows), {422}),
        (server.sent({"questions": [windows] * 6}, target="/v1/answers"), {413, 422}),
        (server.sent(several, target="/v1/answers"), {200}),
        (server.sent(too_many, target="/v1/answers"), {422}),
    ):
        row.injected += 1
        with server.unheld(row, size):
            reply = judge(row, exchange(server.address, asked), within_s=10 + LATE_S * size.patience, allowed=statuses)
    whole = server.ask(several, target="/v1/answers").json()["results"]
    if any("explain" in each or each["timings"].get("total_ms") == 0.0 for each in whole):
        row.wrong += 1
        row.problems.append(f"an item holds explain or no time at all: {whole[0]}")
    assert reply
    return row


# ---- who may ask, and when -----------------------------------------------------------------------------------------


def keys_rewritten(server: Server, size: Size) -> Row:
    row = Row(fault="9: an editor that empties the keys file before it writes; a key with a rate in questions")
    whole = server.keys.read_bytes()
    server.keys.write_bytes(b"")
    row.injected += 1
    end = time.monotonic() + 2.5
    while time.monotonic() < end:
        judge(row, server.ask(ASKED), within_s=SOON_S * size.patience)
        time.sleep(0.1)
    server.keys.write_bytes(whole)
    limited = {"x-api-key": new_key(server.keys, "limited", 0.01, 4, "question")}
    several = question({"questions": [ASKED] * 8}, limited, "/v1/answers")
    end = time.monotonic() + 30
    while (reply := exchange(server.address, several)).status == 401 and time.monotonic() < end:
        time.sleep(0.1)
    judge(row, reply, within_s=SOON_S * size.patience)
    judge(row, exchange(server.address, several), within_s=SOON_S * size.patience, allowed={429})
    return row


def beside_many_questions(server: Server, size: Size) -> Row:
    row = Row(fault=f"9: a client beside two that send {TOGETHER} questions a call, engine slow")
    several = {"questions": [{**ASKED, "question": f"Who {number}?"} for number in range(TOGETHER)]}
    done = threading.Event()

    def flood(number: int) -> None:
        while not done.is_set():
            fresh = {
                "questions": [{**each, "context": f"{number} {time.monotonic()}"} for each in several["questions"]]
            }
            reply = server.ask(fresh, 30_000, "/v1/answers")
            row.injected += 1
            if reply.status != 200:
                row.problems.append(f"{TOGETHER} questions: {reply}")

    seconds = []
    with ThreadPoolExecutor(2) as crowd:
        for number in range(2):
            crowd.submit(flood, number)
        try:
            time.sleep(10 * CALL_S)
            for number in range(min(size.requests // 20, 100)):
                asked = {**ASKED, "context": f"It was made at {number}."}
                seconds.append(judge(row, server.ask(asked), within_s=SOON_S * size.patience).seconds)
        finally:
            done.set()
    by_questions = 2 * TOGETHER * CALL_S / INSTANCES  # what it would wait if turns went round questions
    row.notes.append(
        f"{row.fault}: half answered in {statistics.median(seconds):.2f} s; {by_questions:.1f} s by questions"
    )
    if statistics.median(seconds) > by_questions / 4:
        row.over += 1
        row.problems.append(f"half of its answers took {statistics.median(seconds):.2f} s and more")
    return row


Reproduction = Callable[[Server, Size], Row]
QUICK: Sequence[Reproduction] = (
    *(small_and_slow, full_pools, long_texts, upgrades, odd_frames),
    *(unread_replies, cached_answers, many_values, keys_rewritten),
)
SLOW: Sequence[Reproduction] = (hammered_readiness, beside_many_questions)
"""Of an engine that takes `CALL_S` a call."""


def hostile(size: Size) -> Iterator[Row]:
    """A row for each reproduction."""
    for reproductions, call_s in ((QUICK, 0.0), (SLOW, CALL_S)):
        with serving(call_s) as server:
            for reproduce in reproductions:
                yield attempt(reproduce, server, size)


def attempt(reproduce: Reproduction, server: Server, size: Size) -> Row:
    """Its row; also if it breaks off."""
    try:
        return reproduce(server, size)
    except Exception as error:
        traceback.print_exc()
        return Row(fault=reproduce.__name__, lost=1, problems=[f"broke off: {error!r}"])


@contextlib.contextmanager
def serving(call_s: float) -> Iterator[Server]:
    """A server with keys and the cache, and one that nobody asks anything."""
    with tempfile.TemporaryDirectory(prefix="bertqa-hostile-") as name, ExitStack() as stack:
        directory = Path(name)
        keys = directory / "keys"
        new_key(keys, "first", None, None)
        settings = {"api_keys_file": keys, "cache_mb": 16, "arrival_s": ARRIVAL_S}
        address, process = stack.enter_context(toy_service(directory / "service.log", settings, call_s=call_s))
        quiet = stack.enter_context(toy_service(directory / "idle.log"))
        pulse, idle = (stack.enter_context(Pulse(*each).beating()) for each in ((address, process), quiet))
        yield Server(address, process, keys, pulse, idle)


# ---- with Triton and HAProxy ---------------------------------------------------------------------------------------

SLOW_S = 0.3
"""Seconds of an engine call where clients wait."""


def balanced_metrics(product: Product, size: Size) -> Row:
    row = Row(fault="7: /metrics through the load balancer, however it is written")
    (address,) = product.addresses
    paths = (
        "/metrics",
        "/%6detrics",
        "/%6Detrics",
        "//metrics",
        "/./metrics",
        "/metrics/",
        "/x/../metrics",
        "/metrics?a=1",
    )
    for path in paths:
        row.injected += 1
        reply = judge(row, get(address, path), within_s=SOON_S * size.patience, allowed={400, 404})
        if b"bertqa_" in reply.body:
            row.wrong += 1
            row.problems.append(f"{path} tells the metrics")
    judge(row, exchange(address, question(known_questions()[0])), within_s=SOON_S * size.patience)
    return row


def waiting_clients(product: Product, size: Size) -> Row:
    """Clients that do not try again, at a service with default settings whose engine takes 0.3 s a call."""
    row = Row(fault=f"10: {CLIENTS} and {CROWD} clients that do not try again, engine calls of {SLOW_S:g} s")
    service = product.services[0]
    seconds = max(min(size.requests / 40, 45), 6)
    with product.watched(row, size), product.faults.on("slow", seconds=SLOW_S):
        instances = product.layout.instances
        admission = Admission(HOST, service.port, _one_window(), call_s=SLOW_S, instances=instances)

        async def ask() -> tuple[Outcome, list[Outcome], Outcome]:
            few = await admission.few(max(size.requests // 2, 3 * CLIENTS))
            crowd = await admission.crowd(few.rate, seconds)
            single, _ = await admission.beside(seconds, 1)
            return few, [crowd], single

        few, crowds, single = asyncio.run(ask())
    for outcome in (few, *crowds, single):
        row.requests += len(outcome.load.replies)
        row.right += len(outcome.answered)
        row.lost += len(outcome.failed)
        row.slowest_s = max([row.slowest_s, *outcome.answered])
        row.refused["503"] += outcome.refused
        row.notes.append(f"10: {outcome.row()}")
    row.injected = row.requests
    slack = 1.0 if size.patience == 1 else 1.5
    for goal in admission.goals(few, crowds, single, slack=slack):
        row.notes.append(f"10: {goal}")
        if not goal.is_met:
            row.over += 1
            row.problems.append(goal.text)
    return row


def _one_window() -> list[dict[str, str]]:
    return [each for each in known_questions() if len(each["context"]) < 200]


SCENARIOS: tuple[tuple[Layout, Scenario], ...] = ((BALANCED, balanced_metrics), (Layout(), waiting_clients))
