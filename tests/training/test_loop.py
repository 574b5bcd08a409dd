"""Test the training loop, in this process and as a toy job in several real processes under horovodrun.

Run as a program, this file is that job: ``horovodrun -np 2 python tests/training/test_loop.py --output DIR``.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import torch
import typer
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional
from torch.optim.optimizer import register_optimizer_step_pre_hook

from bertqa.cli.command import parse
from tests.support.paths import ROOT
from training.checkpoints import load_state
from training.distributed import Alone, start_workers
from training.loop import LoopOptions, Task, micro_batches, train
from training.metrics import read_metrics
from training.options import LoopArguments

WORDS, LABELS, ROWS = 16, 4, 60


@dataclass(frozen=True, slots=True)
class ToyBatch:
    tokens: torch.Tensor  # (rows, length)
    labels: torch.Tensor  # (rows, length), -100 where a token is no target
    lengths: tuple[int, ...]


class Toy(torch.nn.Module):
    """Labels each token by itself."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(WORDS, 8)
        self.dropout = torch.nn.Dropout(dropout)
        self.head = torch.nn.Linear(8, LABELS)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.dropout(torch.tanh(self.embedding(tokens))))
        return logits


def row(number: int) -> tuple[list[int], list[int]]:
    """Tokens of a row and their labels; the rows differ in both numbers, and some have no target."""
    chooser = np.random.default_rng([1, number])
    tokens = chooser.integers(0, WORDS, 1 + number % 5)
    targets = chooser.random(len(tokens)) < (number % 3) / 2
    return tokens.tolist(), np.where(targets, tokens * 7 % LABELS, -100).tolist()


def collate(numbers: Sequence[int]) -> ToyBatch:
    rows = [row(number) for number in numbers]
    length = max(len(tokens) for tokens, _ in rows)
    return ToyBatch(
        tokens=torch.tensor([tokens + [0] * (length - len(tokens)) for tokens, _ in rows]),
        labels=torch.tensor([labels + [-100] * (length - len(labels)) for _, labels in rows]),
        lengths=tuple(len(tokens) for tokens, _ in rows),
    )


def toy_loss(model: torch.nn.Module, batch: ToyBatch) -> torch.Tensor:
    logits = model(batch.tokens).float().flatten(0, 1)
    loss = functional.cross_entropy(logits, batch.labels.flatten(), reduction="sum")
    right = (logits.argmax(-1) == batch.labels.flatten()).sum()
    return torch.stack([loss, right.float()])


def toy_task(batch_size: int, **changes: Any) -> Task[int, ToyBatch]:
    def targets(batch: ToyBatch) -> list[int]:
        return [int((batch.labels >= 0).sum())] * 2

    task: dict[str, Any] = {
        "items": lambda step: [(step * batch_size + at) % ROWS for at in range(batch_size)],
        "collate": collate,
        "loss": toy_loss,
        "targets": targets,
        "flops": lambda batch: 6.0 * 8 * LABELS * sum(batch.lengths),
        "terms": {"token_loss": 1.0, "accuracy": 0.0},
    }
    return Task(**task | changes)


TOY: dict[str, Any] = {"batch_size": 12, "learning_rate": 0.01, "precision": "fp32", "save_every": 10, "log_every": 5}


@dataclass(frozen=True, kw_only=True)
class ToyArguments(LoopArguments):
    output: Annotated[Path, typer.Option()]
    dropout: float = 0.0


def toy_options(**changes: Any) -> LoopOptions:
    return LoopOptions(**{**TOY, "steps": 40, **changes})


def toy_model(dropout: float = 0.0) -> Toy:
    torch.manual_seed(0)
    return Toy(dropout)


def main(argv: Sequence[str] | None = None) -> None:
    toy = [f"--{name.replace('_', '-')}={value}" for name, value in TOY.items()]
    args = parse(ToyArguments, [*toy, *(sys.argv[1:] if argv is None else argv)])
    args.output.mkdir(parents=True, exist_ok=True)
    worker = f"{os.environ['HOROVOD_HOSTNAME']}-{os.environ['HOROVOD_LOCAL_RANK']}"
    (args.output / f"{worker}.pid").write_text(str(os.getpid()))
    workers = start_workers()
    reductions = count_reductions()
    pace = args.output / "pace"  # seconds that a forward takes, as the test likes it to be

    def loss(model: torch.nn.Module, batch: ToyBatch) -> torch.Tensor:
        time.sleep(float(pace.read_text()) if pace.exists() else 0.0)
        return toy_loss(model, batch)

    options = LoopOptions.of(args, 40)
    task = toy_task(options.batch_size, loss=loss)
    finished = train(toy_model(args.dropout), task, options, workers, args.output, {})
    if workers.rank == 0:
        (args.output / "done.json").write_text(json.dumps({"finished": finished, "reductions": reductions}))


def count_reductions() -> list[str]:
    """Names of the gradients that Horovod reduces from now on."""
    import horovod.torch.optimizer as horovod_optimizer

    names: list[str] = []
    reduce = horovod_optimizer.allreduce_async_

    def counted(*args: Any, name: str, **more: Any) -> Any:
        names.append(name)
        return reduce(*args, name=name, **more)

    horovod_optimizer.allreduce_async_ = counted
    return names


# --- the loop in this process


def run_alone(output: Path, *, dropout: float = 0.0, **changes: Any) -> Toy:
    options = toy_options(**changes)
    model = toy_model(dropout)
    assert train(model, toy_task(options.batch_size), options, Alone(), output, {})
    return model


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@given(
    items=st.integers(1, 70),
    largest=st.one_of(st.none(), st.integers(1, 20)),
    size=st.integers(1, 5),
)
def test_the_processes_share_out_all_items_of_a_step(items: int, largest: int | None, size: int) -> None:
    shares = [micro_batches(range(items), largest, rank, size) for rank in range(size)]
    pieces = [piece for dealt in zip(*shares, strict=True) for piece in dealt]  # in the order of their numbers
    assert [item for piece in pieces for item in piece] == list(range(items))
    sizes = {len(piece) for piece in pieces}
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= (largest or -(-items // size))
    assert len(pieces) < items / (largest or items) + 2 * size  # no more passes than needed


def test_micro_batches_do_not_depend_on_the_processes_where_they_can_be_dealt_out() -> None:
    alone = micro_batches(range(24), 2, 0, 1)
    for size in (2, 3, 4, 6):
        dealt = [micro_batches(range(24), 2, rank, size) for rank in range(size)]
        assert [dealt[number % size][number // size] for number in range(12)] == alone


def test_the_gradient_is_that_of_the_mean_over_all_targets(tmp_path: Path) -> None:
    model = toy_model()
    expected = toy_model()
    batch = collate(list(range(12)))
    logits = expected(batch.tokens)
    functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100).backward()  # type: ignore[no-untyped-call]
    gradients: list[torch.Tensor] = []

    def keep(optimizer: torch.optim.Optimizer, *_: object) -> None:
        gradients.extend(p.grad.clone() for p in model.parameters() if p.grad is not None)

    handle = register_optimizer_step_pre_hook(keep)
    try:  # five rows at once and then four and three, with other numbers of targets
        options = toy_options(steps=1, micro_batch_size=5, max_gradient_norm=1e9)
        train(model, toy_task(12), options, Alone(), tmp_path, {})
    finally:
        handle.remove()
    for parameter, gradient in zip(expected.parameters(), gradients, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(gradient, parameter.grad)


def test_accumulation_does_not_change_the_run(tmp_path: Path) -> None:
    whole = run_alone(tmp_path / "whole")
    in_parts = run_alone(tmp_path / "parts", micro_batch_size=5)
    torch.testing.assert_close(weights(in_parts), weights(whole))


def test_micro_batches_are_clipped_one_by_one(tmp_path: Path) -> None:
    gradients: list[float] = []

    def keep(optimizer: torch.optim.Optimizer, *_: object) -> None:
        parameters = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
        gradients.append(float(torch.cat(parameters).norm()))

    handle = register_optimizer_step_pre_hook(keep)
    try:
        for clip in ("reduced", "micro-batch"):
            options = toy_options(steps=1, micro_batch_size=4, max_gradient_norm=0.01, clip=clip)
            train(toy_model(), toy_task(12), options, Alone(), tmp_path / clip, {})
    finally:
        handle.remove()
    reduced, separately = gradients
    assert reduced == pytest.approx(0.01, rel=1e-3)
    assert 0.011 < separately <= 0.03  # three addends of that norm


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains_as_fp32_does(tmp_path: Path, precision: str) -> None:
    run_alone(tmp_path / "fp32")
    run_alone(tmp_path / "mixed", precision=precision)
    expected, found = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("fp32", "mixed"))
    assert [record["loss"] for record in found] == pytest.approx([record["loss"] for record in expected], rel=0.02)
    assert ("loss_scale" in found[0]) == (precision == "fp16")


def test_the_loss_scale_is_resumed(tmp_path: Path) -> None:
    whole = run_alone(tmp_path / "whole", precision="fp16")
    options = toy_options(precision="fp16", stop_after=17)
    assert not train(toy_model(), toy_task(12), options, Alone(), tmp_path / "parts", {})
    state = load_state(tmp_path / "parts", options.identity() | {})
    assert state is not None
    assert (state.step, state.scaler["scale"], state.scaler["_growth_tracker"]) == (17, 2.0**16, 17)
    resumed = run_alone(tmp_path / "parts", precision="fp16")
    assert torch.equal(weights(whole), weights(resumed))


def overflowing(model: torch.nn.Module, batch: ToyBatch) -> torch.Tensor:
    loss = toy_loss(model, batch)
    loss.register_hook(lambda gradient: gradient * math.inf)  # type: ignore[no-untyped-call]
    return loss


def test_gradients_that_overflow_at_every_scale_abort_the_run(tmp_path: Path) -> None:
    options = toy_options(precision="fp16", save_every=100)
    with pytest.raises(SystemExit, match=r"step 20: the gradients overflow at a loss scale of 0\.0625 too"):
        train(toy_model(), toy_task(12, loss=overflowing), options, Alone(), tmp_path, {})
    assert load_state(tmp_path, options.identity()) is None


def test_a_loss_that_is_not_finite_aborts_the_run_and_spares_its_state(tmp_path: Path) -> None:
    steps = iter(range(100))

    def loss(model: torch.nn.Module, batch: ToyBatch) -> torch.Tensor:
        return toy_loss(model, batch) * (math.nan if next(steps) == 12 else 1.0)

    options = toy_options()
    with pytest.raises(SystemExit, match="step 15: the loss is nan; lower --learning-rate"):
        train(toy_model(), toy_task(12, loss=loss), options, Alone(), tmp_path, {})
    state = load_state(tmp_path, options.identity())
    assert state is not None
    assert state.step == 10


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, in its compiler
def test_a_compiled_model_trains_as_the_plain_one_does(tmp_path: Path) -> None:
    plain, compiled = run_alone(tmp_path / "plain", steps=5), run_alone(tmp_path / "compiled", steps=5, compile=True)
    torch.testing.assert_close(weights(compiled), weights(plain), rtol=1e-4, atol=1e-5)
    assert load_state(tmp_path / "compiled", toy_options(steps=5).identity()) is not None  # of the same names


@pytest.mark.parametrize("optimizer", ["adamw", "lamb", "nvlamb"])
def test_every_optimizer_resumes_bit_for_bit(tmp_path: Path, optimizer: str) -> None:
    whole = run_alone(tmp_path / "whole", optimizer=optimizer, decay="poly", dropout=0.2)
    options = toy_options(optimizer=optimizer, decay="poly", stop_after=13)
    train(toy_model(0.2), toy_task(12), options, Alone(), tmp_path / "parts", {})
    resumed = run_alone(tmp_path / "parts", optimizer=optimizer, decay="poly", dropout=0.2)
    assert torch.equal(weights(whole), weights(resumed))


def test_a_state_of_other_settings_is_refused_with_the_difference(tmp_path: Path) -> None:
    run_alone(tmp_path, steps=5)
    with pytest.raises(SystemExit, match=r"other settings \(learning_rate 0\.01, now 0\.02\); give another --output"):
        run_alone(tmp_path, steps=5, learning_rate=0.02)


def test_an_evaluation_goes_into_the_records_when_it_is_due(tmp_path: Path) -> None:
    task = toy_task(12, evaluate=lambda: {"dev_accuracy": 0.5}, evaluate_every=12)
    assert train(toy_model(), task, toy_options(), Alone(), tmp_path, {})
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records if "dev_accuracy" in record] == [12, 24, 36, 40]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size", "0"], "'--batch-size': must be at least 1, not 0"),
        (["--micro-batch-size", "-1"], "'--micro-batch-size': must be at least 1"),
        (["--learning-rate", "0"], "'--learning-rate': must be above 0"),
        (["--max-gradient-norm", "inf"], "'--max-gradient-norm': must be above 0"),
        (["--warmup", "1"], "'--warmup': must be a share"),
        (["--precision", "int8"], "Invalid value for '--precision'"),
    ],
)
def test_flags_out_of_range_are_refused(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--output", str(tmp_path), *flags])
    assert message in capsys.readouterr().err


# --- the loop in real processes


class Job:
    """A toy job under horovodrun."""

    def __init__(self, output: Path, *flags: str, processes: int = 2, elastic: Path | None = None) -> None:
        self.output = output
        run = ["-np", str(processes), "--gloo"]
        if elastic:
            run = ["-np", str(processes), "--min-np", "1", "--max-np", "3", "--network-interface", "lo"]
            run += ["--host-discovery-script", str(elastic)]
        folder = Path(sys.executable).parent
        job = [str(folder / "horovodrun"), *run, sys.executable, __file__, "--output", str(output), *flags]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        environment["PATH"] = f"{folder}:{environment['PATH']}"
        output.mkdir(parents=True, exist_ok=True)
        self._log = (output / "log.txt").open("w+")
        self._process = subprocess.Popen(job, cwd=ROOT, env=environment, stdout=self._log, stderr=subprocess.STDOUT)

    def wait_for_step(self, step: int, processes: int | None = None) -> None:
        """Wait until the metrics have a record of the step or a later one, by so many processes if that is given."""
        until = time.monotonic() + 240
        while not any(
            record["step"] >= step and processes in (None, record["processes"])
            for record in read_metrics(self.output / "metrics.jsonl")
        ):
            assert self._process.poll() is None, self.log()
            assert time.monotonic() < until, self.log()
            time.sleep(0.05)

    def pace(self, seconds: float) -> None:
        """Let each forward take so long from now on."""
        (self.output / "pace.new").write_text(str(seconds))
        os.replace(self.output / "pace.new", self.output / "pace")

    def send(self, number: signal.Signals, worker: str) -> None:
        os.kill(int((self.output / f"{worker}.pid").read_text()), number)

    def end(self) -> int:
        """Wait for the end; returns the exit code."""
        code = self._process.wait(timeout=240)
        self._log.close()
        return code

    def log(self) -> str:
        return (self.output / "log.txt").read_text()

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait(timeout=60)
        self._log.close()


def losses(output: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in read_metrics(output / "metrics.jsonl")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes leave behind that nobody disturbs."""
    output = tmp_path_factory.mktemp("whole")
    with Job(output, "--micro-batch-size", "2", "--dropout", "0.1") as job:
        assert job.end() == 0, job.log()
    return output


@pytest.mark.horovod
@pytest.mark.slow
def test_gradients_are_reduced_once_per_step_however_many_micro_batches_it_has(whole: Path) -> None:
    done = json.loads((whole / "done.json").read_text())
    assert done["finished"]
    assert (whole / "loss.png").exists()
    assert len(done["reductions"]) == 40 * len(list(Toy(0.0).parameters()))


@pytest.mark.horovod
@pytest.mark.slow
def test_one_two_and_three_processes_have_the_same_loss_curve(whole: Path, tmp_path: Path) -> None:
    run_alone(tmp_path / "one", dropout=0.1, micro_batch_size=2)
    # A batch of 12 in pieces of 2 is dealt out without a rest; dropout, too, is that of the pieces.
    with Job(tmp_path / "three", "--micro-batch-size", "2", "--dropout", "0.1", processes=3) as job:
        assert job.end() == 0, job.log()
    for output in (whole, tmp_path / "three"):
        for (step, loss), (expected_step, expected) in zip(losses(output), losses(tmp_path / "one"), strict=True):
            assert step == expected_step
            assert loss == pytest.approx(expected, rel=1e-4)


@pytest.mark.horovod
@pytest.mark.slow
def test_a_process_without_a_share_changes_nothing(tmp_path: Path) -> None:
    run_alone(tmp_path / "one", batch_size=2)
    with Job(tmp_path / "three", "--batch-size", "2", processes=3) as job:
        assert job.end() == 0, job.log()
    assert [loss for _, loss in losses(tmp_path / "three")] == pytest.approx(
        [loss for _, loss in losses(tmp_path / "one")], rel=1e-4
    )


@pytest.mark.horovod
@pytest.mark.slow
def test_a_run_that_was_signalled_and_killed_ends_as_an_undisturbed_one(whole: Path, tmp_path: Path) -> None:
    flags = ["--micro-batch-size", "2", "--dropout", "0.1"]
    with Job(tmp_path, *flags) as job:
        job.pace(0.1)
        job.wait_for_step(5)
        job.send(signal.SIGTERM, "localhost-1")  # to one of the two
        assert job.end() == 0, job.log()
        assert "of 40; the same command resumes" in job.log()
    assert not json.loads((tmp_path / "done.json").read_text())["finished"]
    stopped = losses(tmp_path)[-1][0]
    assert 5 < stopped < 40
    with Job(tmp_path, *flags) as job:
        job.wait_for_step(max(25, stopped + 5))
        job.send(signal.SIGKILL, "localhost-0")
        job.send(signal.SIGKILL, "localhost-1")
        assert job.end() != 0
    with Job(tmp_path, *flags) as job:
        job.pace(0)
        assert job.end() == 0, job.log()
    expected, found = (load_file(output / "resume.safetensors") for output in (whole, tmp_path))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    steps = [step for step, _ in losses(tmp_path)]
    assert steps == sorted(set(steps))  # none is told twice
    assert set(losses(tmp_path)[-3:]) <= set(losses(whole))


@pytest.mark.horovod
@pytest.mark.slow
def test_an_elastic_run_survives_the_loss_of_a_process_and_takes_a_new_one(tmp_path: Path) -> None:
    run_alone(tmp_path / "one", micro_batch_size=2)
    hosts, script = tmp_path / "hosts.txt", tmp_path / "discover.sh"
    hosts.write_text(
        "localhost:1\n127.0.0.1:1\n"
    )  # Horovod gives up the whole host of a lost process: two names of one
    script.write_text(f"#!/bin/sh\ncat '{hosts}'\n")
    script.chmod(0o755)
    output = tmp_path / "elastic"
    with Job(output, "--micro-batch-size", "2", elastic=script) as job:
        job.pace(0.1)
        job.wait_for_step(5, processes=2)
        job.send(signal.SIGKILL, "localhost-0")
        job.wait_for_step(10, processes=1)
        hosts.write_text("localhost:2\n127.0.0.1:2\n")  # of which one is given up
        job.pace(0.5)  # time enough for a new process to start
        job.wait_for_step(15, processes=2)
        job.pace(0)
        assert job.end() == 0, job.log()
    # An interval's loss lacks what the lost process had added up; all others are those of the undisturbed run.
    told, expected = losses(output), losses(tmp_path / "one")
    assert [step for step, _ in told] == [step for step, _ in expected]
    differing = [step for (step, loss), (_, right) in zip(told, expected, strict=True) if abs(loss / right - 1) > 1e-4]
    assert len(differing) <= 1
    state, reference = (load_file(directory / "resume.safetensors") for directory in (output, tmp_path / "one"))
    for name in state:
        torch.testing.assert_close(state[name], reference[name], rtol=1e-3, atol=1e-5)


if __name__ == "__main__":
    main()
