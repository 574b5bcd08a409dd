"""Faults of the engine, of the network to it, of bundles, and of disk and clock."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

from bertqa.cli.command import status
from bertqa.manifest import MODEL_NAME
from service.commands import models
from tests.chaos.clients import DEADLINE_S, load
from tests.chaos.product import PATIENT, Layout, Product
from tests.chaos.relay import nonsense
from tests.chaos.report import Row, Size
from tests.support.bundles import break_engine, expect_another_answer, flip, publish
from tests.support.paths import ROOT
from tests.support.waiting import until

Scenario = Callable[[Product, Size], Row]
PLAIN = Layout(settings=PATIENT)
RELAYED = Layout(settings=PATIENT, relayed=True)
JUMPING = Layout(settings=PATIENT, clock=True)

FULL_DISK = Path("/dev/full")
"""A device without space: every write to it fails."""


# The engine's process


def _in_rounds(product: Product, size: Size, fault: str, strike: Callable[[], None]) -> Row:
    """Inject a fault several times, evenly spaced under load; each time the engine must recover."""
    row = Row(fault=fault)
    with product.watched(row, size), load(row, product.asked, product.addresses, size) as clients:
        for number in range(1, size.rounds + 1):
            clients.until(requests=size.requests * number // (size.rounds + 1))
            strike()
            row.injected += 1
            product.ready_after(row, product.engine_answers)
        clients.until(requests=size.requests, right=row.right + size.clients)
    return row


def triton_killed(product: Product, size: Size) -> Row:
    (triton,) = product.tritons

    def strike() -> None:
        pid = triton.pid
        assert pid
        os.kill(pid, signal.SIGKILL)
        until(lambda: triton.pid not in (None, pid), "Triton is not started again")

    return _in_rounds(product, size, "Triton killed (-9)", strike)


def engine_process_dies(product: Product, size: Size) -> Row:
    (triton,) = product.tritons

    def strike() -> None:
        pid, before = triton.pid, product.faults.injected
        with product.faults.on("crash"):
            until(lambda: product.faults.injected > before, "no fault was injected")
        until(lambda: triton.pid not in (None, pid), "Triton is not started again")

    return _in_rounds(product, size, "engine process dies during a call", strike)


def triton_stopped(product: Product, size: Size) -> Row:
    (triton,) = product.tritons

    def strike() -> None:
        pid = triton.pid
        assert pid
        os.kill(pid, signal.SIGSTOP)
        time.sleep(DEADLINE_S + 1)
        os.kill(pid, signal.SIGCONT)

    return _in_rounds(product, size, "Triton stopped (SIGSTOP) for longer than the deadline", strike)


def triton_restarted(product: Product, size: Size) -> Row:
    fault = "Triton ended (SIGTERM) and replaced"
    return _in_rounds(product, size, fault, lambda: product.restart_triton(0))


# Faulty engine replies


def _engine_fails(product: Product, size: Size, *, fault: str, **how: float | str) -> Row:
    row = Row(fault=fault)
    before = product.faults.injected
    with product.watched(row, size), load(row, product.asked, product.addresses, size) as clients:
        clients.until(requests=size.requests // 4)
        with product.faults.on(**how):  # type: ignore[arg-type]
            clients.until(requests=row.requests + size.requests // 2)
            until(lambda: product.faults.injected > before, "no fault was injected")
        product.ready_after(row, product.engine_answers)
        clients.until(requests=size.requests, right=row.right + size.clients)
    row.injected = product.faults.injected - before
    return row


def engine_slow(product: Product, size: Size) -> Row:
    return _engine_fails(
        product, size, fault="engine slow: 0.3 s in 20 % of calls", kind="slow", share=0.2, seconds=0.3
    )


def engine_hangs(product: Product, size: Size) -> Row:
    return _engine_fails(
        product,
        size,
        fault="engine slower than the deadline in 1 of 200 calls",
        kind="slow",
        share=0.005,
        seconds=DEADLINE_S + 1,
    )


def engine_says_nan(product: Product, size: Size) -> Row:
    return _engine_fails(product, size, fault="engine returns NaN in a third of calls", kind="nan", share=0.33)


def engine_says_infinity(product: Product, size: Size) -> Row:
    return _engine_fails(product, size, fault="engine always returns infinity", kind="infinite")


def engine_says_other_shapes(product: Product, size: Size) -> Row:
    return _engine_fails(
        product, size, fault="engine returns wrong shapes in a third of calls", kind="shape", share=0.33
    )


def engine_says_errors(product: Product, size: Size) -> Row:
    return _engine_fails(product, size, fault="engine always returns errors", kind="error")


# The network to the engine


def _way_fails(product: Product, size: Size, *, fault: str, begin: Callable[[], None], seconds: float) -> Row:
    row = Row(fault=fault)
    relay = product.relay
    with product.watched(row, size), load(row, product.asked, product.addresses, size) as clients:
        for number in range(1, size.rounds + 1):
            clients.until(requests=size.requests * number // (size.rounds + 1))
            begin()
            row.injected += 1
            time.sleep(seconds)
            relay.restore()
            product.ready_after(row, product.engine_answers)
        clients.until(requests=size.requests, right=row.right + size.clients)
    return row


def channel_cut(product: Product, size: Size) -> Row:
    return _way_fails(product, size, fault="connection to Triton cut for 2 s", begin=product.relay.cut, seconds=2)


def channel_silent(product: Product, size: Size) -> Row:
    fault = "connection to Triton stalls for longer than the deadline"
    return _way_fails(product, size, fault=fault, begin=product.relay.hold, seconds=DEADLINE_S + 1)


def channel_says_garbage(product: Product, size: Size) -> Row:
    return _way_fails(product, size, fault="random bytes instead of HTTP/2", begin=product.relay.garble, seconds=2)


def another_server_answers(product: Product, size: Size) -> Row:
    with nonsense() as address:
        fault = "gRPC server replies with random or empty messages"
        return _way_fails(product, size, fault=fault, begin=partial(product.relay.lead_to, address), seconds=2)


# Bundles


def _models(product: Product, *words: str) -> int:
    """Run `bertqa models` in this process; its output goes to a log."""
    flags = ["--repository", str(product.repository.root), "--triton-url", product.tritons[0].url]
    with (product.directory / "models.log").open("a") as log, redirect_stdout(log), redirect_stderr(log):
        return status(models.app, [*words[:1], *flags, *words[1:]])


def bundle_loaded(product: Product, size: Size) -> Row:
    row = Row(fault="new version loaded, activated and rolled back")

    def switched(*words: str, version: int) -> None:
        assert _models(product, *words) == 0, f"bertqa models {words[0]} failed; see {product.directory}/models.log"
        until(lambda: product.versions() == {version}, "the services do not switch")

    with (product.directory / "build.log").open("a") as log, redirect_stdout(log), redirect_stderr(log):
        publish(product.repository, product.directory, 2, instances=product.layout.instances)
    assert _models(product, "load", MODEL_NAME, "2") == 0
    switched("switch", MODEL_NAME, "2", version=2)
    product.learn()
    switched("rollback", MODEL_NAME, version=1)
    with product.watched(row, size), load(row, product.asked, product.addresses, size) as clients:
        for number in range(1, size.rounds + 1):
            assert _models(product, "unload", MODEL_NAME, "2") == 0
            assert _models(product, "load", MODEL_NAME, "2") == 0
            switched("switch", MODEL_NAME, "2", version=2)
            clients.until(requests=size.requests * (2 * number - 1) // (2 * size.rounds))
            switched("rollback", MODEL_NAME, version=1)
            clients.until(requests=size.requests * number // size.rounds)
            row.injected += 3
    assert _models(product, "unload", MODEL_NAME, "2") == 0
    if row.refused:
        row.problems.append(f"refused although nothing failed: {row.refusal}")
    return row


def corrupt_bundle_refused(product: Product, size: Size) -> Row:
    row = Row(fault="corrupt bundles refused while the old version serves")
    model = product.repository.root / MODEL_NAME
    spoils: tuple[Callable[[Path], None], ...] = (
        lambda directory: flip(directory / "engine.bin"),
        lambda directory: flip(directory / "tokenizer.json"),
        lambda directory: os.truncate(directory / "manifest.json", 1),
        break_engine,
        expect_another_answer,
    )
    with product.watched(row, size), load(row, product.asked, product.addresses, size) as clients:
        for number, spoil in enumerate(spoils, 1):
            version = max(int(path.name) for path in model.glob("[1-9]*")) + 1
            directory = product.directory / "spoiled"
            shutil.copytree(model / "1", directory)
            spoil(directory)
            directory.rename(model / str(version))
            if _models(product, "load", MODEL_NAME, str(version)) == 0:
                row.problems.append(f"corrupt bundle {number} was loaded")
            row.injected += 1
            clients.until(requests=size.requests * number // len(spoils))
            shutil.rmtree(model / str(version))
    if row.refused:
        row.problems.append(f"refused although the old version was available: {row.refusal}")
    return row


# Disk and clock


def disk_full(product: Product, size: Size) -> Row:
    """Run with no space for Triton's log, the launcher's log and changes of the repository."""
    row = Row(fault="disk full for logs and repository")
    with product.watched(row, size), load(row, product.asked, product.addresses, size) as clients:
        clients.until(requests=size.requests // 4)
        log = product.tritons[0].log_file
        log.unlink()
        log.symlink_to(FULL_DISK)
        row.injected += 1
        pid = product.tritons[0].pid
        assert pid
        os.kill(pid, signal.SIGKILL)  # a restart writes many log lines
        until(lambda: product.tritons[0].pid not in (None, pid), "Triton is not started again")
        product.ready_after(row, product.engine_answers)
        before, copied = product.repository.serving(), str(max(product.repository.versions(MODEL_NAME)) + 1)
        shutil.copytree(product.repository.directory(MODEL_NAME, 1), product.directory / copied)
        (product.directory / copied).rename(product.repository.root / MODEL_NAME / copied)
        command = [sys.executable, "-m", "bertqa.cli", "models", "load", MODEL_NAME, copied]
        command += ["--repository", str(product.repository.root), "--triton-url", product.tritons[0].url]
        done = subprocess.run(
            command,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            preexec_fn=partial(resource.setrlimit, resource.RLIMIT_FSIZE, (0, 0)),
        )
        row.injected += 1
        if done.returncode != 1 or "Traceback" in done.stderr or product.repository.serving() != before:
            row.problems.append(f"bertqa models: exit code {done.returncode}, {done.stderr[-300:]}")
        clients.until(requests=size.requests, right=row.right + size.clients)
    log.unlink()
    return row


def clock_jumps(product: Product, size: Size) -> Row:
    row = Row(fault="clock jumps forward and back by an hour, a day and a year")
    hour, day, year = 3600, 86_400, 31_536_000
    jumps = (hour, 0, -hour, day, -day, year, 0)
    with product.watched(row, size), load(row, product.asked, product.addresses, size) as clients:
        for number, seconds in enumerate(jumps, 1):
            clients.until(requests=size.requests * number // (len(jumps) + 1))
            product.set_clock(seconds)
            row.injected += 1
        clients.until(requests=size.requests, right=row.right + size.clients)
    if row.refused:
        row.problems.append(f"refused although only the clock jumped: {row.refusal}")
    return row


SCENARIOS: tuple[tuple[Layout, Scenario], ...] = (
    (PLAIN, triton_killed),
    (PLAIN, triton_stopped),
    (PLAIN, triton_restarted),
    (PLAIN, engine_process_dies),
    (PLAIN, engine_slow),
    (PLAIN, engine_hangs),
    (PLAIN, engine_says_nan),
    (PLAIN, engine_says_infinity),
    (PLAIN, engine_says_other_shapes),
    (PLAIN, engine_says_errors),
    (PLAIN, bundle_loaded),
    (PLAIN, corrupt_bundle_refused),
    (PLAIN, disk_full),
    (RELAYED, channel_cut),
    (RELAYED, channel_silent),
    (RELAYED, channel_says_garbage),
    (RELAYED, another_server_answers),
    (JUMPING, clock_jumps),
)
