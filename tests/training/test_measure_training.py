"""Test the speed benchmark: it saves its repeats (with numbers instead of launches), and small real launches work."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from bertqa.cli.command import parse
from training import measure_training
from training.measure_commands import MeasureOptions
from training.measure_training import GPU_RESULTS_FILE, RESULTS_FILE, Results, main
from training.speed import Speed


class Launches:
    """Stands for the launches: gives every contender a speed that tells in which launch it was measured."""

    def __init__(self) -> None:
        self.plans: list[tuple[int, list[Any]]] = []
        self.fail_at: int | None = None

    def __call__(self, processes: int, threads: int, plan: Mapping[str, Any], directory: Path) -> dict[str, Any]:
        if len(self.plans) == self.fail_at:
            raise SystemExit("killed")
        self.plans.append((processes, plan["contenders"]))
        rates = [float(10 * len(self.plans) + number) for number in range(len(plan["contenders"]))]
        speeds = [Speed(sequences_per_second=rate, mfu=0.5, step_seconds=1, optimizer_seconds=0.01) for rate in rates]
        found = {"speeds": [asdict(speed) for speed in speeds], "gradient_bytes": 1000}
        return found | {"all_reduce_seconds": 0.1 * processes}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Three of them are a repeat: a process with two threads, one with one, and two processes."""
    made = Launches()
    monkeypatch.setattr(measure_training, "launch", made)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    return made


def measure(output: Path, repeats: int, *more: str) -> Results:
    flags = ["--sequences", "64", "--precisions", "fp32", "--precisions", "bf16", "--repeats", str(repeats)]
    main(parse(MeasureOptions, ["--output", str(output), *flags, *more]))
    return Results.read(output / RESULTS_FILE)


def test_a_run_that_was_ended_goes_on_with_the_repeats_that_are_missing(
    launches: Launches, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launches.fail_at = 5  # in the second repeat, which is lost
    with pytest.raises(SystemExit, match="killed"):
        measure(tmp_path, 3)
    assert Results.read(tmp_path / RESULTS_FILE).repeats == 1
    launches.fail_at = None
    results = measure(tmp_path, 3)
    assert len(launches.plans) == 5 + 6
    assert results.repeats == 3
    assert {len(row.speeds) for row in results.rows} == {3}
    assert results.all_reduce_seconds == [0.2] * 3
    assert [processes for processes, _ in launches.plans[5:]] == [1, 1, 2] * 2
    forward, backward = (launches.plans[number][1] for number in (0, 5))
    assert backward == forward[::-1]
    first, last = (next(row for row in results.rows if asdict(row.contender) == forward[number]) for number in (0, -1))
    assert first.rates == [10, 60 + len(forward) - 1, 90]
    assert last.rates == [10 + len(forward) - 1, 60, 90 + len(forward) - 1]
    printed = capsys.readouterr().out
    assert "3 repeats" in printed
    assert "fp32, compiled" in printed
    for name in ("time_and_workers", "precision", "and_trainer"):
        assert (tmp_path / f"training_{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("more", "named"), [(("--batch-size", "16"), "settings"), (("--precisions", "fp32"), "rows")])
def test_results_of_another_comparison_are_refused_and_kept(
    more: tuple[str, ...], named: str, launches: Launches, tmp_path: Path
) -> None:
    measure(tmp_path, 1)
    before = (tmp_path / RESULTS_FILE).read_bytes()
    with pytest.raises(SystemExit, match=rf"{named}.*; give another --output"):
        measure(tmp_path, 2, *more)
    assert (tmp_path / RESULTS_FILE).read_bytes() == before
    assert len(launches.plans) == 3


@pytest.mark.slow
@pytest.mark.horovod
def test_a_real_comparison(tmp_path: Path) -> None:
    """The Trainer, our loop, one process and two of Horovod's: all of them train."""
    main(parse(MeasureOptions, ["--quick", "--no-compile", "--precisions", "fp32", "--output", str(tmp_path)]))
    results = Results.read(tmp_path / RESULTS_FILE)
    assert {row.processes for row in results.rows} == {1, 2}
    assert all(rate > 0 for row in results.rows for rate in row.rates)
    assert results.gradient_bytes > 0
    assert len(results.all_reduce_seconds) == 1
    figures = {path.name for path in tmp_path.glob("*.png")}
    assert figures == {"training_time_and_workers.png", "training_and_trainer.png"}  # there is no second precision


@pytest.mark.slow
def test_the_suite_for_gpus_on_what_is_there(tmp_path: Path) -> None:
    main(
        parse(MeasureOptions, ["--quick", "--gpu-suite", "--no-compile", "--config", "tiny", "--output", str(tmp_path)])
    )
    rows = json.loads((tmp_path / GPU_RESULTS_FILE).read_text())["rows"]
    assert [row["tokens"] for row in rows] == [128, 512, 384]
    assert all(row["speed"]["sequences_per_second"] > 0 for row in rows)


def test_batches_that_are_not_made_of_whole_micro_batches_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(MeasureOptions, ["--micro-batch-size", "5"])
    assert "--batch-size must be a multiple of --micro-batch-size" in capsys.readouterr().err
