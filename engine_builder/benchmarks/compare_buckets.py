"""What length buckets are worth: the CPU engine of a repository, compiled for several lists of them, on real windows.

A window is padded to the shortest bucket that holds it, so more buckets mean less padding, and each costs memory in
every process that holds the engine. Every list gets such a process; they take turns, a block of windows each.
"""

if __name__ == "__main__":  # before the imports, because --help needs none of them
    from bertqa.cli.command import run
    from engine_builder.benchmarks.commands import buckets_app

    run(buckets_app, "python -m engine_builder.benchmarks.compare_buckets")


import multiprocessing
import os
import re
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from bertqa.manifest import Manifest
from bertqa.repository import Repository
from bertqa.squad import read_squad
from bertqa.windows import Window, WindowTokenizer
from engine_builder.benchmarks.commands import BucketsOptions
from engine_builder.publish import BuildRefused
from engine_builder.targets import openvino
from engine_builder.targets.openvino import Precision

BLOCK = 10
"""Windows of a turn."""


@dataclass(slots=True)
class Row:
    """The measurements of one list."""

    buckets: tuple[int, ...]
    seconds: list[float] = field(default_factory=list)  # of each call
    lengths: list[int] = field(default_factory=list)  # of its window, padding included
    memory_mib: float = 0.0


def main(args: BucketsOptions) -> None:
    """Measure and print the table.

    Raises:
        BuildRefused: the engine is not one of a CPU, or a list has no bucket for the longest window.
    """
    repository = Repository(args.repository)
    bundle = repository.open()
    manifest = bundle.manifest
    if manifest.target != "cpu":
        raise BuildRefused(f"--repository: {manifest.identity} is no engine for a CPU")
    directory = repository.directory(bundle.model, bundle.version)
    for buckets in args.lists():
        if buckets[-1] < manifest.max_seq_len:
            raise BuildRefused(f"--buckets: a window may have {manifest.max_seq_len} tokens, and {buckets[-1]} is less")
    rows = [Row(buckets) for buckets in args.lists()]
    with ExitStack() as stack:
        lines = [_start(stack, directory, manifest, args, row.buckets) for row in rows]
        for _ in range(args.rounds):
            for first in range(0, min(line.recv() for line in lines), BLOCK):
                for row, line in zip(rows, lines, strict=True):
                    line.send(first)
                    seconds, lengths = line.recv()
                    row.seconds += seconds
                    row.lengths += lengths
            for line in lines:
                line.send(None)
        for row, line in zip(rows, lines, strict=True):
            row.memory_mib = line.recv()
    print(f"{manifest.identity}, {len(rows[0].seconds) // args.rounds} windows, {args.rounds} times\n")
    print("| buckets | tokens with padding | mean ms | p50 ms | p99 ms | of the first | memory MiB |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        p50, p99 = (1e3 * float(np.percentile(row.seconds, percent)) for percent in (50, 99))
        mean = 1e3 * float(np.mean(row.seconds))
        print(
            f"| {', '.join(map(str, row.buckets))} | {np.mean(row.lengths):.0f} | {mean:.2f} | {p50:.2f} | {p99:.2f} | "
            f"{np.mean(row.seconds) / np.mean(rows[0].seconds):.2f} | {row.memory_mib:.0f} |"
        )


def _start(
    stack: ExitStack, directory: Path, manifest: Manifest, args: BucketsOptions, buckets: tuple[int, ...]
) -> Connection:
    context = multiprocessing.get_context("spawn")  # like a process of Triton, it starts without our memory
    line, other = context.Pipe()
    process = context.Process(target=_serve, args=(other, directory, manifest, args, buckets), daemon=True)
    process.start()
    other.close()
    stack.callback(process.terminate)
    return line


def _serve(
    line: Connection, directory: Path, manifest: Manifest, args: BucketsOptions, buckets: tuple[int, ...]
) -> None:
    """Run in a process: for each round send the number of windows, then run the requested blocks."""
    tokenizer = WindowTokenizer.from_directory(
        directory,
        max_seq_len=manifest.max_seq_len,
        max_question_tokens=manifest.max_question_tokens,
        overlap=manifest.overlap,
        buckets=buckets,
    )
    precision: Precision = manifest.precision  # type: ignore[assignment]  # of a CPU engine
    predict = openvino.load(directory / manifest.engine_file, precision, buckets, args.threads)
    examples = read_squad(args.data)
    chosen = examples[:: max(1, len(examples) // args.questions)][: args.questions]
    windows = [window for each in chosen for window in tokenizer(each.question, each.context).windows]
    for length in buckets:  # the first call of a length is slower
        row = np.ones((1, length), np.int32)
        predict(Window(row, row, row, 1, 0, 1))
    for _ in range(args.rounds):
        line.send(len(windows))
        while (first := line.recv()) is not None:
            block, seconds = windows[first : first + BLOCK], []
            for window in block:
                began = time.perf_counter()
                predict(window)
                seconds.append(time.perf_counter() - began)
            line.send((seconds, [window.length for window in block]))
    line.send(own_memory_mib())
    line.recv()  # blocks until this process is terminated


def own_memory_mib() -> float:
    """Private memory of this process, without the shared pages of the engine's file and libraries."""
    rollup = Path(f"/proc/{os.getpid()}/smaps_rollup").read_text()
    return sum(map(int, re.findall(r"^Private_\w+:\s+(\d+) kB", rollup, re.MULTILINE))) / 1024
