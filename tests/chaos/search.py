"""Search for expensive requests: hypothesis varies requests to maximize time, event-loop holds, replies and memory.

The service is a separate process behind a real socket, with default settings and an engine without cost, so the search
measures the service's own cost. Every request has a deadline of one second.
"""

import json
import secrets
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, target
from hypothesis import strategies as st

from tests.chaos.pulse import Pulse, Times, memory_mib
from tests.chaos.report import Row, Size
from tests.chaos.toy_service import toy_service
from tests.chaos.wire import Address, Reply, exchange, request

DEADLINE_S = 1.0
LATE_S = 0.5
"""Seconds after its deadline within which a request and its work must end."""
HOLD_S = 0.05
"""Longest time in seconds that the event loop may be held."""
REPLY_BYTES = 8 << 20
"""Largest reply: a MiB of answers, where JSON needs at most six bytes per byte, and the JSON around them."""
MEMORY_MIB = 512
STATUSES = {200, 400, 404, 405, 408, 413, 415, 422, 431, 503, 504}
SHARE = 0.02
"""Requests for each of `Size.inputs`."""
FLOOR = 1_000
"""Bytes: what is smaller does not count as better."""


@dataclass(frozen=True, slots=True)
class Sent:
    """A request, with a one-line description."""

    content: bytes
    told: str


# ---- requests ------------------------------------------------------------------------------------------------------

UNITS = (
    *(
        "a",
        "I",
        " ",
        ".",
        "\n",
        "\r\n",
        "\r",
        "\t",
        "\0",
        "\x01",
        "\x85",
        '"',
        "\\",
        "{",
        "[",
        ",",
        "1",
        "1,",
        "1.",
        "-",
    ),
    *("a ", "a b ", ". ", "##a", "[CLS]", "[SEP] ", "the ", "a" * 100 + " ", "b" * 1_000 + " ", " " * 1_000 + "a"),
    *("\u203c\u200d", "\u203c", "\u200d", "\u0301", "e\u0301", "\u0323\u0307", "\ufe0f", "\u20e3", "1\ufe0f\u20e3"),
    *("\U0001f1e6", "\U0001f1f0\U0001f1f7", "👩\u200d", "👨\u200d👩\u200d👧\u200d👦", "👍🏽", "🏽", "😀", "\U000e0067"),
    *(
        "각",
        "한국어",
        "ᄀ",
        "\u1100\u1161\u11a8",
        "\u1100\u1161",
        "漢",
        "か\u3099",
        "กำ",
        "\u0e33",
        "क्षि",
        "\u094d\u0937",
    ),
    *("\u0600", "\u0903", "\u202e", "\ufeff", "\u00ad", "\u2028", "\u3000", "ﷺ", "İ", "ß", "ﬁ", "𝒳", "\U0010ffff", "é"),
)
MOST_CHARS = 201_000
"""Slightly more than the limit for the contexts of a question."""


def powers(most: int) -> st.SearchStrategy[int]:
    """Integers up to a bound, small ones as often as large ones."""
    return st.integers(0, 64).map(lambda step: round(most ** (step / 64)))


@st.composite
def texts(draw: st.DrawFn, most: int = MOST_CHARS) -> tuple[str, str]:
    """A text of a few repeated pieces, with its description."""
    pieces = draw(
        st.lists(
            st.tuples(st.lists(st.sampled_from(UNITS), min_size=1, max_size=3).map("".join), powers(most)),
            min_size=1,
            max_size=3,
        )
    )
    whole = "".join(unit * (count if len(pieces) > 1 else max(count // len(unit), 1)) for unit, count in pieces)
    again = draw(powers(most))
    text = (whole * again)[:most] if len(whole) * again < 4 * most else whole[:most]
    told = " + ".join(f"{_short(unit)} × {count:,}" for unit, count in pieces)
    return text, f"({told}) × {again:,}, {len(text):,} characters"


def _short(text: str) -> str:
    told = ascii(text)
    return told if len(told) < 50 else f"{told[:20]}…{told[-10:]} ({len(text)} characters)"


@st.composite
def questions(draw: st.DrawFn) -> tuple[dict[str, Any], str]:
    """A question for ``/v1``, with most numbers at an extreme."""
    number = draw(st.sampled_from((0, 0, 0, 2, 8, 64, 65)))
    text, told = draw(texts(MOST_CHARS if number < 2 else MOST_CHARS // number))
    asked, told_asked = draw(st.just(("who", "'who'")) | texts(1_000))
    body: dict[str, Any] = {
        "question": asked,
        "top_k": draw(st.sampled_from((1, 2, 100, 100))),
        "max_answer_tokens": draw(st.sampled_from((1, 15, 200, 200))),
        "overlap": draw(st.sampled_from((None, 0, 16, 40, 45, 59))),
        "explain": draw(st.booleans()),
        "offset_unit": draw(st.sampled_from(("codepoint", "utf16", "byte"))),
    }
    body |= {"contexts": [text] * number} if number else {"context": text}
    numbers = ", ".join(f"{name} {body[name]}" for name in list(body)[1:6])
    return body, f"question {told_asked}, {numbers}, {f'{number} contexts' if number else 'context'} {told}"


@st.composite
def asked(draw: st.DrawFn) -> Sent:
    """Requests to ``/v1/answer``, ``/v1/answers`` and the Hugging Face routes."""
    body, told = draw(questions())
    how = draw(st.sampled_from(("/v1/answer", "/v1/answer", "/v1/answers", "/", "/predict", "/models/x")))
    copies = draw(st.sampled_from((1, 2, 8, 64, 65)))
    value: dict[str, Any] = body
    if how == "/v1/answers":
        value, told = {"questions": [body] * copies}, f"{copies} × {told}"
    elif how != "/v1/answer":
        contexts = body.get("contexts") or [body["context"]]
        instances = [{"question": body["question"], "context": each} for each in contexts]
        parameters = {"top_k": body["top_k"], "max_answer_len": body["max_answer_tokens"], "max_seq_len": 384}
        parameters |= {"doc_stride": body["overlap"] or 0, "align_to_words": body["explain"]}
        name = "instances" if len(instances) > 1 or how == "/predict" else "inputs"
        value = {name: instances if name == "instances" else instances[0], "parameters": parameters}
    escaped = draw(st.integers(0, 4)) == 0
    content = json.dumps(value, ensure_ascii=escaped).encode(errors="surrogatepass")
    return Sent(_post(how, content), f"POST {how} {told}{', escaped' if escaped else ''}")


JSON_PIECES = (
    *(
        b"[",
        b"{}",
        b"[],",
        b"{},",
        b'"",',
        b'{"a":',
        b'"a":1,',
        b'[{"a":"[,"},',
        b'"\\"",',
        b'"\\u0301',
        b"\\ud83d\\ude00",
    ),
    *(
        b"9",
        b"1,",
        b"-1e9,",
        b"0." + b"1" * 30 + b",",
        b"null,",
        b"true,",
        b" ",
        b"\n",
        b"\xff",
        b"\xe2\x80\x8d",
        b"NaN,",
    ),
)
WRAPS = (
    b"",
    b'{"question": "who", "context": ',
    b'{"question": "who", "contexts": [',
    b'{"questions": [',
    b'{"inputs": [',
    b"[",
)
ENDS = (b"", b"]", b"}", b"1]}", b'""]}', b'"]}', b"{}]}")


@st.composite
def structures(draw: st.DrawFn) -> Sent:
    """JSON with an expensive structure: depth, width, names, numbers, escapes."""
    piece, count = draw(st.sampled_from(JSON_PIECES)), draw(powers(2_100_000))
    wrap, end = draw(st.sampled_from(WRAPS)), draw(st.sampled_from(ENDS))
    body = (wrap + piece * (count // len(piece)) + end)[: (2 << 20) + 1]
    how = draw(st.sampled_from(("/v1/answer", "/v1/answers", "/", "/predict")))
    told = f"{wrap.decode()} {piece.decode(errors='replace')!a} × {count // len(piece):,} {end.decode()}"
    return Sent(_post(how, body), f"POST {how} {told}")


@st.composite
def heads(draw: st.DrawFn) -> Sent:
    """Long or many headers before a small question."""
    value, count = draw(st.sampled_from(("x", ",", ";", "a=b;", "\xe9", "%41", "&a=1", "1"))), draw(powers(33_000))
    name = draw(st.sampled_from(("x-api-key", "content-type", "accept", "traceparent", "x-request-id", "x-timeout-ms")))
    lines, told, how = {"x-timeout-ms": "1000"}, "", "/predict"
    match draw(st.integers(0, 2)):
        case 0:
            lines, told = {name: value * count}, f"{name}: {value!r} × {count:,}"
        case 1:
            lines = {f"x-{number}": value for number in range(count // 8)}
            told = f"{count // 8:,} headers"
        case _:
            how += "?" + (value * count)[:count]
            told = f"query {value!r} × {count:,}"
    body = b'{"inputs": {"question": "who", "context": "in"}}'
    return Sent(request("POST", how, body, lines), f"POST /predict {told}")


def _post(target: str, body: bytes) -> bytes:
    return request("POST", target, body, {"x-timeout-ms": f"{DEADLINE_S * 1000:.0f}"})


REQUESTS = st.one_of(asked(), asked(), asked(), structures(), heads())


# ---- cost ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of a request; times exclude those of other work on this machine."""

    sent: Sent
    reply: Reply
    seconds: float  # until the complete reply
    cpu: float  # CPU seconds of the process until it was idle
    hold: float  # of the event loop, seconds
    noise: float  # the part of hold that an idle process showed meanwhile
    after: float  # seconds of work after the reply
    grown: float  # MiB of resident memory

    @property
    def measures(self) -> dict[str, float]:
        """What is made large."""
        each = {"seconds": self.seconds, "CPU": self.cpu, "hold": self.hold}
        each |= {"bytes": float(len(self.reply.body)), "memory": max(self.grown, 0.0)}
        size = max(len(self.sent.content), FLOOR) / 1000
        return {**each, **{f"{name} per KB": value / size for name, value in each.items()}}

    def __str__(self) -> str:
        return (
            f"{self.seconds:.2f} s, {self.cpu:.2f} s of CPU, hold {self.hold * 1000:.0f} ms, {self.grown:+.0f} MiB, "
            f"{len(self.sent.content):,} bytes -> {self.reply.status}, {len(self.reply.body):,} bytes: {self.sent.told}"
        )


class Searched:
    """A service, and an idle one next to it that shows which part of a hold is caused by the machine."""

    def __init__(self, address: Address, process: int, pulse: Pulse, idle: Pulse) -> None:
        self._address, self.process, self._pulse, self._idle = address, process, pulse, idle
        self.noise_s = 0.0
        """Return the longest hold of the idle service."""

    def cost(self, sent: Sent) -> Cost:
        """Send a request and wait until the service is idle."""
        memory, times = memory_mib(self.process), Times(self.process)
        self._pulse.begin()
        self._idle.begin()
        reply = exchange(self._address, sent.content)
        seconds = max(reply.seconds - times.waited_s, 0.0)
        after = self._until_quiet()
        cpu, hold = times.ran_s, self._pulse.longest()
        noise = self._idle.longest()
        self.noise_s = max(self.noise_s, noise)
        return Cost(sent, reply, seconds, cpu, hold, noise, after, memory_mib(self.process) - memory)

    def _until_quiet(self) -> float:
        """Return the seconds until the process only answers liveness checks."""
        began, times = time.monotonic(), Times(self.process)
        while (passed := time.monotonic() - began) < 10:
            times.begin()
            time.sleep(0.05)
            if times.ran_s + times.waited_s < 0.03:
                break
        return passed


def broken_bounds(cost: Cost, patience: float) -> list[str]:
    """Return the limits that a request exceeded."""
    late_s, hold_s = LATE_S * patience, HOLD_S * patience + cost.noise
    found = []
    if cost.reply.status not in STATUSES:
        found.append(f"status {cost.reply}")
    if cost.seconds > DEADLINE_S + late_s:
        found.append(f"{cost.seconds:.2f} s; at most {DEADLINE_S + late_s:.2f}")
    if cost.after > late_s + DEADLINE_S:
        found.append(f"worked for {cost.after:.2f} s more; at most {DEADLINE_S + late_s:.2f}")
    if cost.hold > hold_s:
        found.append(f"event loop held for {cost.hold:.3f} s; at most {hold_s:.3f} here")
    if len(cost.reply.body) > REPLY_BYTES:
        found.append(f"{len(cost.reply.body):,} bytes of reply; at most {REPLY_BYTES:,}")
    return found


def search(size: Size, seed: int, *, planted_s: float = 0.0) -> Row:
    """Send requests from hypothesis, and report the worst one by each measure.

    Args:
        size: number of requests, and patience.
        seed: seed that reproduces the search.
        planted_s: seconds for which an engine call holds the event loop, as a fault to find.
    """
    row = Row(fault="slow and large requests, searched for")
    worst: dict[str, Cost] = {}
    with tempfile.TemporaryDirectory(prefix="bertqa-search-") as directory, ExitStack() as stack:
        address, process = stack.enter_context(toy_service(Path(directory) / "service.log", planted_s=planted_s))
        quiet = stack.enter_context(toy_service(Path(directory) / "idle.log"))
        pulse, idle = (stack.enter_context(Pulse(*each).beating()) for each in ((address, process), quiet))
        service = Searched(address, process, pulse, idle)
        service.cost(Sent(_post("/v1/answer", b'{"question": "who", "context": "in"}'), "a small one"))  # first of all

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=max(int(size.inputs * SHARE), 10),
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.target),
            suppress_health_check=list(HealthCheck),
        )
        @hypothesis.given(REQUESTS)
        def run(sent: Sent) -> None:
            cost = service.cost(sent)
            broken = broken_bounds(cost, size.patience)
            for _ in range(2):  # what is the machine's does not come three times
                if broken:
                    cost = service.cost(sent)
                    broken = broken_bounds(cost, size.patience)
            _note(row, cost, broken)
            for name, value in cost.measures.items():
                target(value, label=name)
                if name not in worst or value > worst[name].measures[name]:
                    worst[name] = cost

        run()
        peak = memory_mib(process, "VmHWM")
    row.problems.extend(pulse.failures[:5])
    if peak > MEMORY_MIB:
        row.over += 1
        row.problems.append(f"memory came to {peak:.0f} MiB; at most {MEMORY_MIB}")
    row.fault += f": hold of an idle process {service.noise_s * 1000:.0f} ms, peak of memory {peak:.0f} MiB"
    row.notes = [f"seed {seed}", *(f"worst by {name}: {cost}" for name, cost in worst.items())]
    return row


def _note(row: Row, cost: Cost, broken: list[str]) -> None:
    row.requests += 1
    row.injected += 1
    row.slowest_s = max(row.slowest_s, cost.seconds)
    status = cost.reply.status
    row.right += status == 200
    row.hung += status == 0
    row.lost += status not in STATUSES and status != 0
    row.over += bool(broken)
    if status not in (200, 0):
        row.refused[str(status)] += 1
    if broken and len(row.problems) < 5:
        row.problems.append(f"{'; '.join(broken)}: {cost}")


def searches(size: Size) -> Iterator[Row]:
    """Return the row; its notes have the seed that reproduces the search."""
    yield search(size, secrets.randbelow(1 << 31))
