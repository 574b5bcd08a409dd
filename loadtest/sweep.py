"""Measure throughput against clients: the whole load test, as `make loadtest`.

Starts all servers itself, by the product's own commands: Triton servers with one or two engine instances, replicas of
the service, and HAProxy before them with deploy/haproxy.cfg. First one undisturbed client asks every question, and its
answers are the truth for all that follows. Then four phases: clients in a closed loop for every number of replicas and
instances; fixed rates of arrivals on one replica; other questions on it; and replicas, each with a Triton of its own,
whose engines sleep a fixed time instead of computing, so that cores do not limit.

Every point is written when it is measured. A second call with the same --output continues where the first one ended.
"""

if __name__ == "__main__":  # before the imports, of which --help needs none
    from bertqa.cli.command import run
    from loadtest.commands import app

    run(app, "python -m loadtest.sweep")

import asyncio
import contextlib
import json
import math
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit

from bertqa.squad import read_squad
from loadtest import sleeping_engine
from loadtest.closed_loop import closed_loop, for_requests, http_post
from loadtest.commands import SweepOptions
from loadtest.points import Load, Point, curve_of, knees, summarize
from loadtest.replies import RIGHT, best_answer, judge
from loadtest.report import table, write_report
from loadtest.servers import (
    PROJECT,
    ServerFailed,
    Stack,
    copy_repository,
    ensure_engine,
    get_json,
    machine,
    stack,
)
from loadtest.tables import markdown
from loadtest.workload import Asked, Kind, make_requests, write_requests

FEWER: Mapping[Kind, int] = {"short": 1, "several": 8, "long": 16}
"""Short requests for each request of a kind; few of the slow kinds, because one client asks them all first."""
SLEEP_S = 0.05
"""Seconds of a call of the sleeping engine; with two instances, a replica can give at most 40 answers/s."""
CLIENTS_PER_SLEEPER = 6
"""Clients for each replica there: two are being answered, the others keep its queue neither empty nor full."""
SHARES = (0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.2)
"""Rates of arrivals, as shares of the closed loop's peak."""
WORKLOADS: tuple[tuple[str, str, tuple[int, ...]], ...] = (
    ("short", "zipf", (1, 16)),
    ("several", "unique", (1, 16)),
    ("long", "unique", (1, 4)),
    ("short=90,several=9,long=1", "unique", (16,)),
)
"""Mix, repetition and numbers of clients of the other questions."""


def plan(args: SweepOptions) -> list[Load]:
    """All loads in the order of their servers."""
    most = max(args.instances)
    loads = [
        Load(phase="closed", replicas=replicas, instances=instances, clients=clients)
        for instances in sorted(args.instances, reverse=True)
        for replicas in args.replicas
        for clients in args.clients
    ]
    one = Load(phase="open", replicas=min(args.replicas), instances=most)
    shares = SHARES[1::3] if args.quick else SHARES
    loads += [replace(one, share=share) for share in shares]
    for mix, repeat, clients in WORKLOADS:
        counts = clients[-1:] if args.quick else clients
        loads += [replace(one, phase="workload", mix=mix, repeat=repeat, clients=count) for count in counts]
    for replicas in args.replicas:
        sleeping = Load(phase="scaling", replicas=replicas, tritons=replicas, clients=CLIENTS_PER_SLEEPER * replicas)
        loads.append(sleeping)
    chosen = [each for each in loads if each.phase in args.phases]
    return sorted(chosen, key=lambda each: (each.phase == "scaling", -each.instances, each.replicas))


def main(args: SweepOptions) -> None:
    """Measure the points that are missing, and write the report."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # so that the servers are stopped too
    until = time.monotonic() + 60 * args.stop_after
    args.output.mkdir(parents=True, exist_ok=True)
    ensure_engine(args.repository, args.checkpoint)
    points = read_points(args.output)
    done = {point.load for point in points}
    todo = [load for load in plan(args) if load not in done]
    for _, group in groupby(todo, _servers_of):
        if time.monotonic() < until:
            measure_group(args, list(group), points, until)
    print_summary(points, args.output)
    left = len([load for load in plan(args) if load not in {point.load for point in points}])
    if left:
        print(f"\n{left} points are left; the same command continues with them.")
    if any(point.wrong or point.error for point in points):
        sys.exit("There were wrong answers or errors: see the report.")


def measure_group(args: SweepOptions, loads: Sequence[Load], points: list[Point], until: float) -> None:
    """Start the servers that some loads share, measure one after the other, and write each down.

    Args:
        args: of the command line.
        loads: with the same servers.
        points: of all loads so far; grows.
        until: `time.monotonic` seconds, after which no further one is begun.
    """
    first, logs = loads[0], args.output / "logs"
    sleeps = first.phase == "scaling"
    with tempfile.TemporaryDirectory() as directory:
        repository = Path(directory) / "model_repository"
        if sleeps:
            sleeping_engine.write_repository(
                repository, source=args.repository, seconds=SLEEP_S, instances=first.instances
            )
        else:
            copy_repository(args.repository, repository, first.instances)
        balanced = args.balancer == "haproxy"
        with stack(
            repository, logs, replica_count=first.replicas, triton_count=first.tritons, balanced=balanced
        ) as servers:
            kinds: tuple[Kind, ...] = ("short",) if sleeps else get_args(Kind)
            requests = _truth(args, servers, _facts(args, servers, sleeps)["engine"], kinds)
            for load in loads:
                if time.monotonic() > until:
                    break
                closed = curve_of(points, replicas=load.replicas, instances=load.instances)
                peak = max((each.throughput for each in closed.values()), default=0.0)
                if load.share and not peak:
                    continue  # its closed loop was not asked for
                point = measure(args, servers, load, requests, rate=load.share * peak)
                points.append(point)
                with (args.output / "points.jsonl").open("a") as file:
                    file.write(json.dumps(asdict(point)) + "\n")
                print(_line(point), flush=True)
    write_report(args.output, _read_facts(args.output), points)


def _servers_of(load: Load) -> tuple[bool, int, int, int]:
    return load.phase == "scaling", load.replicas, load.tritons, load.instances


def measure(args: SweepOptions, servers: Stack, load: Load, requests: Path, *, rate: float) -> Point:
    """Run a load against running servers.

    Raises:
        ServerFailed: the clients did not end as they should.
    """
    began = datetime.now(timezone.utc).isoformat(timespec="seconds")
    users = load.clients or args.processes
    with tempfile.NamedTemporaryFile(suffix=".json") as result:
        command = [sys.executable, "-m", "locust", "--headless", "--only-summary", "--loglevel", "WARNING"]
        command += ["--locustfile", str(PROJECT / "loadtest" / "locustfile.py"), "--host", servers.url]
        command += ["--users", str(users), "--spawn-rate", str(users), "--exit-code-on-error", "0"]
        command += ["--requests", str(requests), "--mix", load.mix, "--repeat", load.repeat, "--rate", str(rate)]
        command += ["--warmup", str(args.warmup), "--seconds", str(args.seconds), "--result", result.name]
        if args.processes > 1:
            command += ["--processes", str(args.processes)]
        cpu, engine = servers.cpu_seconds(), servers.engine_seconds()
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=300, check=False)
        text = Path(result.name).read_text()
        if done.returncode or not text:
            raise ServerFailed(f"locust ended with exit code {done.returncode}:\n{done.stdout}{done.stderr}")
        document = json.loads(text)
        cpu = {role: seconds - cpu[role] for role, seconds in servers.cpu_seconds().items()}
        engine = {name: total - engine[name] for name, total in servers.engine_seconds().items()}
    return summarize(
        load,
        document,
        cpu_s={**cpu, "clients": document["cpu_s"]},
        engine=engine,
        memory_mib=servers.memory_mib(),
        rate=rate,
        date=began,
        commit=commit(),
    )


def _truth(args: SweepOptions, servers: Stack, engine: str, kinds: Sequence[Kind]) -> Path:
    """Path of the requests with the answers of an undisturbed service; made if there is none for this engine."""
    path: Path = args.output / f"requests-{engine}.jsonl"
    if not path.exists():
        examples = read_squad(args.data)
        counts = {kind: -(-args.questions // FEWER[kind]) for kind in kinds}
        asked = [each for kind, count in counts.items() for each in make_requests(examples, kind, count)]
        write_requests(path, answered(servers.url, asked))
    return path


def answered(url: str, asked: Sequence[Asked]) -> list[Asked]:
    """Ask an otherwise idle service the requests one by one, and keep its answers.

    Raises:
        ServerFailed: one was not answered.
    """
    address = urlsplit(url)
    host, port = str(address.hostname), address.port or 80
    bodies = enumerate(http_post(host, port, "/v1/answer", each.body().encode()) for each in asked)
    load = asyncio.run(closed_loop(host, port, bodies, 1, until=for_requests(len(asked))))
    found = []
    for each, reply in zip(asked, load.replies, strict=True):
        outcome, answer = judge(each, reply.status, {}, reply.body)
        if outcome != RIGHT:
            raise ServerFailed(f"an undisturbed service gave: {outcome}")
        found.append(replace(each, answer=best_answer(answer)))
    return found


def read_points(output: Path) -> list[Point]:
    """Read the points of earlier calls."""
    path = output / "points.jsonl"
    return [Point(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def _facts(args: SweepOptions, servers: Stack, sleeps: bool) -> dict[str, Any]:
    """Describe what the numbers depend on, and check it against an earlier call.

    Raises:
        ServerFailed: the output directory holds numbers of another engine, machine or setting.
    """
    path = args.output / "facts.json"
    info = get_json(f"{servers.replicas[0].url}/info")
    if sleeps:
        return {"engine": info["model"]}
    triton = get_json(f"http://127.0.0.1:{servers.tritons[0].ports['http']}/v2")
    facts: dict[str, Any] = {
        "title": f"{info['model']}, {machine()['cores']} cores",
        "engine": info["model"],
        "machine": machine(),
        "versions": {
            **info["versions"],
            **info["manifest"]["runtime"],
            "triton": triton["version"],
            "locust": version("locust"),
        },
        "questions": f"{args.questions} of {args.data.name}",
        "seconds": args.seconds,
        "warmup_s": args.warmup,
        "load_processes": args.processes,
        "balancer": args.balancer,
    }
    if path.exists():
        before = json.loads(path.read_text())
        changed = [name for name, value in facts.items() if before.get(name) != value]
        if changed:
            raise ServerFailed(f"{args.output}: measured with another {', '.join(changed)}; choose another --output")
    else:
        facts["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        facts["commit"] = commit()
        facts["command"] = f"python -m loadtest.sweep {' '.join(sys.argv[1:])}".strip()
        path.write_text(json.dumps(facts, indent=1) + "\n")
    return facts


def _read_facts(output: Path) -> dict[str, Any]:
    path = output / "facts.json"
    facts: dict[str, Any] = (
        json.loads(path.read_text()) if path.exists() else {"title": "an engine that sleeps", "date": ""}
    )
    return facts


def commit() -> str:
    """Commit of the working tree, with a plus if it has changes; empty outside a repository."""
    with contextlib.suppress(OSError):
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=10", "--exclude=*"],
            cwd=PROJECT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        return found.stdout.strip()
    return ""


def _line(point: Point) -> str:
    load = f"{point.clients:3d} clients" if point.clients else f"{point.rate:5.1f} arrivals/s"
    others = "".join(f", {count} {outcome}" for outcome, count in point.outcomes.items() if outcome != RIGHT)
    return (
        f"{point.phase:8} {point.replicas} replicas, {point.instances} instances, {load}, {point.mix} {point.repeat}: "
        f"{point.throughput:6.1f}/s, p50 {point.p50_ms:.1f}, p99 {point.p99_ms:.1f} ms{others}"
    )


def print_summary(points: Sequence[Point], output: Path) -> None:
    """Print the tables for the documents."""
    closed = [each for each in points if each.phase == "closed"]
    if closed:
        print(f"\n{markdown([{k: f'{v:.4g}' for k, v in row.items()} for row in knees(points)])}")
    scaling = curve_of(points, "scaling")
    if scaling:
        first = next(iter(scaling.values()))
        rows = table(
            list(scaling.values()), ("replicas", "clients", "throughput", "p50_ms", "p99_ms", "cpu_service_ms")
        )
        for row, point in zip(rows, scaling.values(), strict=True):
            row["times one"] = f"{point.throughput / (first.throughput or math.nan):.2f}"
        print(markdown(rows))
    print(f"Everything is in {output / 'report.html'}")
