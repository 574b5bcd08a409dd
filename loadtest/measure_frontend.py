"""The service's own CPU time per request: everything that is not the engine.

Starts the real product, posts real one-window questions over kept-alive connections, and reads the CPU clock of the
uvicorn process before and after: HTTP, JSON, tokenizing, gRPC, decoding. Triton and the engine run in processes of
their own and are not counted. The row of ``/health/live`` is the floor of the HTTP server under the same clients.
"""

import argparse
import http.client
import itertools
import json
import platform
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from urllib.parse import urlsplit

import psutil

PROJECT = Path(__file__).resolve().parent.parent


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    questions = PROJECT / "checkpoints" / "minilm-l6-squad" / "gate.json"
    parser.add_argument("--data", type=Path, default=questions, help="SQuAD file with the questions")
    parser.add_argument("--requests", type=int, default=1000, help="for each row of the table")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8], help="one row for each number of clients")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Print the table."""
    bodies = one_window_bodies(args.data)
    process = subprocess.Popen(
        [sys.executable, "-m", "service", "--port", "0", "--triton-grpc-port", "0"],
        cwd=PROJECT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        address = urlsplit(ready_address(process))
        host, port = str(address.hostname), int(address.port or 80)
        uvicorn = next(
            child for child in psutil.Process(process.pid).children(recursive=True) if "uvicorn" in child.cmdline()
        )
        print(f"{date.today()}, {cpu_name()}, {psutil.cpu_count()} cores, {args.requests} requests a row\n")
        print("| request | clients | service CPU ms | p50 ms | of which tokenize | infer | decode | requests/s |")
        print("|---|---|---|---|---|---|---|---|")
        for clients in args.clients:
            for name, method, path, payloads in (
                ("/v1/answer, one window", "POST", "/v1/answer", bodies),
                ("/health/live", "GET", "/health/live", [b""]),
            ):
                post_all(host, port, method, path, payloads, clients, args.requests // 10)  # warm-up
                before, began = cpu_seconds(uvicorn), time.monotonic()
                latencies, timings = post_all(host, port, method, path, payloads, clients, args.requests)
                seconds = time.monotonic() - began
                own = 1000 * (cpu_seconds(uvicorn) - before) / len(latencies)
                stages = [
                    f"{statistics.median(t[stage] for t in timings):.2f}" if timings else ""
                    for stage in ("tokenize_ms", "infer_ms", "decode_ms")
                ]
                print(
                    f"| {name} | {clients} | {own:.2f} | {1000 * statistics.median(latencies):.2f} | "
                    f"{' | '.join(stages)} | {len(latencies) / seconds:.0f} |",
                    flush=True,
                )
    finally:
        process.terminate()
        process.wait(60)


def one_window_bodies(path: Path) -> list[bytes]:
    """Requests from a SQuAD file; its paragraphs fit one window of 384 tokens with few exceptions, left out here."""
    document = json.loads(path.read_bytes())
    return [
        json.dumps({"question": qas["question"], "context": paragraph["context"]}).encode()
        for article in document["data"]
        for paragraph in article["paragraphs"]
        for qas in paragraph["qas"]
        if len(paragraph["context"]) < 1200
    ]


def post_all(
    host: str, port: int, method: str, path: str, bodies: Sequence[bytes], clients: int, requests: int
) -> tuple[list[float], list[dict[str, float]]]:
    """Send so many requests from so many closed-loop clients; returns seconds and the replies' own timings.

    Raises:
        RuntimeError: a reply was not 200, or had no answer.
    """
    turns = itertools.count()
    latencies: list[float] = []
    timings: list[dict[str, float]] = []
    failures: list[str] = []

    def client() -> None:
        connection = http.client.HTTPConnection(host, port, timeout=60)
        while not failures and (turn := next(turns)) < requests:
            began = time.perf_counter()
            connection.request(method, path, bodies[turn % len(bodies)], {"content-type": "application/json"})
            response = connection.getresponse()
            body = response.read()
            latencies.append(time.perf_counter() - began)
            if response.status != 200:
                failures.append(f"{path}: status {response.status}: {body[:200]!r}")
            elif method == "POST":
                reply = json.loads(body)
                timings.append(reply["timings"])
                if not reply["answers"]:
                    failures.append(f"{path}: no answer")
        connection.close()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise RuntimeError(failures[0])
    return latencies, timings


def ready_address(process: "subprocess.Popen[str]") -> str:
    """The address that the launcher says it is ready at; its other lines go on to standard error."""
    assert process.stderr
    for line in process.stderr:
        sys.stderr.write(line)
        if match := re.search(r"ready at (http://\S+)", line):
            forward: Callable[[], None] = lambda: sys.stderr.writelines(process.stderr or ())  # noqa: E731
            threading.Thread(target=forward, daemon=True).start()
            return match[1]
    raise RuntimeError(f"the service ended with exit code {process.wait()}")


def cpu_seconds(process: psutil.Process) -> float:
    """User and system time of a process and its threads."""
    times = process.cpu_times()
    return float(times.user + times.system)


def cpu_name() -> str:
    """The processor's name as Linux gives it."""
    try:
        names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return str(names[0]) if names else platform.processor()


if __name__ == "__main__":
    main(parse_args())
