"""Our service and the servers that people would pick instead, on the same questions: throughput, latency, memory, F1.

In each round the servers take turns. Each is started anew and is alone on the machine, so a slow minute of the machine
meets all of them, and no memory is shared between two servers. Every reply is checked: it must be a piece of its text,
at its place. EM and F1 are measured on the first ``--questions`` of the shuffled file, which all servers are asked. If
a server says "not now" (429 or 503 with Retry-After), the client waits and asks again; all of it counts as latency.
"""

if __name__ == "__main__":  # before the imports, because --help needs none of them
    from bertqa.cli.command import run
    from loadtest.commands import compare_app

    run(compare_app, "python -m loadtest.compare_servers")


import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import IO

import psutil

from bertqa.hardware import cpu_name
from bertqa.squad import Example, read_squad, score
from loadtest.closed_loop import Load, Reply, closed_loop, for_requests, for_seconds, http_post
from loadtest.commands import CompareOptions
from loadtest.peers.servers import BASELINE, HOST, OURS, PROJECT, Server, prepare, servers
from loadtest.servers import free_ports, tree_memory
from loadtest.tables import heading, row

START_S = 120.0  # longest start of a server
WARM_UP = 24  # requests, of 8 clients


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The questions and loads for every server."""

    examples: Sequence[Example]  # each server gets them in this order, again and again
    scored: int  # number of questions, from the first, that all servers are asked, for EM and F1
    clients: Sequence[int]  # a load of each number of clients in each round
    seconds: float  # of a load
    rounds: int


@dataclass(slots=True)
class Measured:
    """The measurements of a server."""

    loads: dict[int, list[Load]] = field(default_factory=dict)  # by number of clients, one a round
    answers: dict[int, str] = field(default_factory=dict)  # the first answer to each question, by its number
    errors: list[str] = field(default_factory=list)  # what was no answer
    wrong: list[str] = field(default_factory=list)  # answers that are no piece of their text
    memory: list[int] = field(default_factory=list)  # bytes, after each round
    start_s: list[float] = field(default_factory=list)
    dead: str = ""  # why it could not be measured, or not to the end


class ServerDied(Exception):
    """A server did not start, or ended; the message says what is known."""


def main(args: CompareOptions) -> None:
    """Print the table."""
    data = args.data or args.checkpoint / "gate.json"
    examples = read_squad(data)
    random.Random(0).shuffle(examples)  # so that every stretch of them is a fair sample
    plan = Plan(
        examples=examples,
        scored=min(args.questions, len(examples)),
        clients=args.clients,
        seconds=args.seconds,
        rounds=args.rounds,
    )
    with tempfile.TemporaryDirectory(prefix="bertqa-peers-") as directory:
        # not resolved: a virtual environment's python is a link to one that knows nothing of it
        known = servers(args.peers_python.absolute(), args.checkpoint.resolve(), Path(directory))
        if unknown := [name for name in args.only or () if name not in known]:
            sys.exit(f"--only {unknown[0]}: the servers are {', '.join(known)}")
        chosen = {name: server for name, server in known.items() if not args.only or name in args.only}
        prepare(args.peers_python.absolute(), args.checkpoint.resolve(), Path(directory))
        found = compare(chosen, plan, lambda line: print(line, file=sys.stderr, flush=True))
    print(
        f"{date.today()}, {cpu_name()}, {psutil.cpu_count()} cores, {plan.rounds} rounds, loads of {plan.seconds:g} s"
    )
    print(f"EM and F1 on {plan.scored} questions of {data.name}\n")
    print(report({name: server.title for name, server in chosen.items()}, found, plan))


def compare(chosen: Mapping[str, Server], plan: Plan, say: Callable[[str], None]) -> dict[str, Measured]:
    """Measure servers in turns; a server that dies is left out from then on.

    Args:
        chosen: by name.
        plan: what they are asked.
        say: takes a line on each turn.

    Returns:
        What was measured, by name in the given order.
    """
    names = list(chosen)
    turns = {name: _Turns(chosen[name], plan) for name in names}
    for number in range(plan.rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            found = turns[name].found
            if not found.dead:
                try:
                    line = turns[name].take(last=number == plan.rounds - 1)
                except ServerDied as error:
                    found.dead = line = str(error)
                say(f"round {number + 1}, {name}: {line}")
    return {name: turns[name].found for name in names}


class _Turns:
    """The turns of one server."""

    def __init__(self, server: Server, plan: Plan) -> None:
        self._server, self._plan = server, plan
        self._questions = itertools.cycle(range(len(plan.examples)))
        self.found = Measured()

    def take(self, *, last: bool) -> str:
        """Start the server, load it, stop it; returns a summary line.

        Raises:
            ServerDied: it did not start, or ended by itself.
        """
        plan, found = self._plan, self.found
        with tempfile.TemporaryFile() as log, self._running(log) as (process, port):
            self._load(port, itertools.cycle(range(len(plan.examples))), 8, for_requests(WARM_UP))
            rates = []
            for clients in plan.clients:
                load = self._load(port, self._questions, clients, for_seconds(plan.seconds))
                if process.poll() is not None:
                    raise ServerDied(_last_words(process, log))
                found.loads.setdefault(clients, []).append(load)
                rates.append(f"{_rate(load):.1f}")
            found.memory.append(tree_memory(process.pid))
            if last:
                unasked = [number for number in range(plan.scored) if number not in found.answers]
                self._load(port, iter(unasked), 8, for_requests(len(unasked)))
        memory, start_s = found.memory[-1] / 2**20, found.start_s[-1]
        return f"{' / '.join(rates)} requests/s, {memory:.0f} MiB, ready after {start_s:.1f} s"

    @contextlib.contextmanager
    def _running(self, log: IO[bytes]) -> "Iterator[tuple[subprocess.Popen[bytes], int]]":
        port, began = free_ports(1)[0], time.monotonic()
        try:
            process = subprocess.Popen(
                [part.format(port=port) for part in self._server.command],
                cwd=PROJECT,
                env=os.environ | self._server.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        except OSError as error:
            raise ServerDied(f"cannot be started: {error}") from error
        try:
            while True:  # only an answer shows that everything behind the port is there
                reply = _ask(port, [self._request(port, 0)], 1, for_requests(1)).replies[0]
                if reply.status == 200:
                    break
                if process.poll() is not None:
                    raise ServerDied(_last_words(process, log))
                if time.monotonic() - began > START_S:
                    raise ServerDied(f"no answer within {START_S:.0f} s; last {reply.status} {reply.body[:200]!r}")
                time.sleep(0.2)
            self.found.start_s.append(time.monotonic() - began)
            yield process, port
        finally:
            _end(process)

    def _load(self, port: int, questions: Iterator[int], clients: int, until: Callable[[int], bool]) -> Load:
        load = _ask(port, (self._request(port, number) for number in questions), clients, until)
        for reply in load.replies:
            self._check(reply)
        return load

    def _request(self, port: int, number: int) -> tuple[int, bytes]:
        example = self._plan.examples[number]
        body = json.dumps({"question": example.question, "context": example.context}).encode()
        return number, http_post(HOST, port, self._server.path, body)

    def _check(self, reply: Reply) -> None:
        if reply.status != 200:
            self.found.errors.append(f"status {reply.status}: {reply.body[:200]!r}")
            return
        example = self._plan.examples[reply.key]
        try:
            span = self._server.span(json.loads(reply.body))
            text, start, end = span[self._server.text], span["start"], span["end"]
            right = bool(text) and example.context[start:end] == text
        except (ValueError, LookupError, TypeError):
            right = False
        if right:
            self.found.answers.setdefault(reply.key, text)
        else:
            self.found.wrong.append(f"question {example.id}: {reply.body[:200]!r}")


def report(titles: Mapping[str, str], found: Mapping[str, Measured], plan: Plan) -> str:
    """Format the results in Markdown: a row for each server, the ratios to ours, and the errors.

    Args:
        titles: of the servers, by name.
        found: what `compare` measured.
        plan: what it was given.
    """
    names = ["server"]
    for clients in plan.clients:
        names += [f"{clients} client{'s' * (clients > 1)}: requests/s", "p50 ms", "p99 ms"]
    lines = [heading([*names, "memory MiB", "EM", "F1", "errors", "wrong", "shed"])]
    for name, measured in found.items():
        cells = []
        for clients in plan.clients:
            replies = [reply for load in measured.loads.get(clients, ()) for reply in load.replies]
            seconds = sorted(reply.seconds for reply in replies if reply.status == 200)
            cells.append(f"{rate(measured, clients):.1f}")
            cells += [f"{1e3 * seconds[int(share * len(seconds))]:.0f}" if seconds else "" for share in (0.5, 0.99)]
        texts = {plan.examples[number].id: text for number, text in measured.answers.items()}
        result = score(plan.examples[: plan.scored], texts)
        shed = sum(reply.shed for loads in measured.loads.values() for load in loads for reply in load.replies)
        cells += [f"{max(measured.memory, default=0) / 2**20:.0f}", f"{result.exact_match:.1f}", f"{result.f1:.1f}"]
        cells += map(str, (len(measured.errors), len(measured.wrong), shed))
        lines.append(row([titles[name], *cells]))
    lines += ["", *_ratios(titles, found, plan.clients), ""]
    for name, measured in found.items():
        if measured.dead:
            lines.append(f"{titles[name]} died: {measured.dead}")
        lines += [f"{titles[name]}: {what}" for what in (measured.errors[:2] + measured.wrong[:2])]
    loads = [load for measured in found.values() for each in measured.loads.values() for load in each]
    if answered := sum(len(load.replies) for load in loads):
        cpu = 1e3 * sum(load.client_cpu for load in loads) / answered
        lines.append(f"The clients took {cpu:.2f} ms of CPU time for each request.")
    return "\n".join(lines)


def _ratios(titles: Mapping[str, str], found: Mapping[str, Measured], clients: Sequence[int]) -> Iterable[str]:
    """The ratio of our throughput to that of the others, at each number of clients."""
    others = [name for name in found if name not in (OURS, BASELINE) and found[name].loads]
    if OURS not in found or not found[OURS].loads:
        return
    for count in clients:
        ours = rate(found[OURS], count)
        against = []
        if BASELINE in found and rate(found[BASELINE], count):
            against.append(f"{ours / rate(found[BASELINE], count):.2f}× {titles[BASELINE]}")
        if others:
            best = max(others, key=lambda name: rate(found[name], count))
            against.append(f"{ours / rate(found[best], count):.2f}× the best of the others, {titles[best]}")
        yield f"- {count} client{'s' * (count > 1)}: {', '.join(against)}"


def rate(measured: Measured, clients: int) -> float:
    """Answers per second at a number of clients: the median of the rounds, 0 without any."""
    return statistics.median(map(_rate, measured.loads.get(clients, ()))) if clients in measured.loads else 0.0


def _rate(load: Load) -> float:
    return sum(reply.status == 200 for reply in load.replies) / load.seconds


def _ask(port: int, requests: Iterable[tuple[int, bytes]], clients: int, until: Callable[[int], bool]) -> Load:
    return asyncio.run(closed_loop(HOST, port, iter(requests), clients, until=until))


def _last_words(process: "subprocess.Popen[bytes]", log: IO[bytes]) -> str:
    log.seek(0)
    lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    return f"ended with exit code {process.returncode}; {lines[-1] if lines else 'it wrote nothing'}"


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Stop a server and its descendants; kill them after 20 seconds."""
    tree = []
    with contextlib.suppress(psutil.NoSuchProcess):
        tree = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for left in psutil.wait_procs(tree, timeout=5)[1]:
        left.send_signal(signal.SIGKILL)
