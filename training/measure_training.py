"""Measure the speed of training next to the Hugging Face ``Trainer``; print tables and draw figures.

``python -m training.measure_training --output runs/speed`` compares, on this machine and in one run: one process and
one per core, fp32 and bf16, random batches, batches of similar length and packed ones, whole batches and micro-batches,
AdamW and LAMB, our loop and the ``Trainer``. All repeats are interleaved: a ratio compares two neighbours in time, and
its spread is reported. Each repeat is saved in ``--output``: an interrupted run continues with the missing repeats, and
more can be added.

``python -m training.measure_training --gpu-suite`` measures BERT-large on a GPU: pre-training phases 1 and 2 and SQuAD,
next to NVIDIA's published numbers. Under ``horovodrun -np 8`` it uses eight GPUs.
"""

if __name__ == "__main__":  # before the imports, because --help needs none of them
    from bertqa.cli.command import run
    from training.measure_commands import app

    run(app, "python -m training.measure_training")


import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from tokenizers import Tokenizer

from training.checkpoints import save_json
from training.distributed import Alone, start_workers
from training.measure_commands import MeasureOptions
from training.options import Precision
from training.pretrain import new_config
from training.scaling import CostModel, Line, plot_speeds, plot_training_time
from training.shards import ShardSet
from training.speed import (
    Contender,
    Speed,
    Workload,
    all_reduce_seconds,
    full_features,
    full_pairs,
    measure,
    real_features,
    real_pairs,
    write_pairs,
)

PROJECT = Path(__file__).resolve().parent.parent
RESULTS_FILE = "training_speed.json"
GPU_RESULTS_FILE = "training_speed_gpu.json"
GOAL = 1.5
"""Goal for our loop with bf16 and bucketing: sequences per second as a multiple of the default ``Trainer``."""
LAMB_GOAL = 0.05
"""Goal for LAMB's update: largest share of a step."""
JOB = 2 * 88_524
"""Number of sequences in the training time figure: two epochs of SQuAD v1.1 windows."""
NETWORK, NETWORK_LATENCY = 100e9 / 8, 50e-6
"""Bytes per second, and seconds per message, of a nominal 100 Gbit/s network, for the cost model."""


class GpuRow(NamedTuple):
    """A row of the GPU suite."""

    contender: Contender
    tokens: int
    max_predictions_per_seq: int
    warm_up: int
    steps: int
    published: float  # sequences per second of one A100-80G: NVIDIA's DeepLearningExamples, BERT for PyTorch, 21.11
    goal: float  # as a multiple of the published number
    mfu_goal: float | None


_PRETRAINING = Contender(
    loop="ours", data="mlm", layout="bucketed", precision="bf16", optimizer="lamb", batch_size=2048, compile=True
)
GPU_SUITE = {
    "pre-training, phase 1": GpuRow(replace(_PRETRAINING, micro_batch_size=256), 128, 20, 5, 15, 580, 2.5, 0.45),
    "pre-training, phase 2": GpuRow(
        replace(_PRETRAINING, batch_size=512, micro_batch_size=64), 512, 80, 5, 15, 210, 2.5, None
    ),
    "fine-tuning on SQuAD": GpuRow(
        replace(_PRETRAINING, data="squad", optimizer="adamw", batch_size=32), 384, 0, 30, 90, 110, 2.5, None
    ),
}


@dataclass(frozen=True, slots=True)
class Row:
    """A contender with its number of processes and threads, and its measurements."""

    processes: int
    threads: int
    contender: Contender
    speeds: list[Speed] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        """Return the sequences per second of each repeat."""
        return [speed.sequences_per_second for speed in self.speeds]

    def median(self, name: str) -> float:
        """Return the median of a field of `Speed`."""
        return float(statistics.median(getattr(speed, name) for speed in self.speeds))


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """All measurements of a run, as stored in ``training_speed.json``."""

    machine: str
    date: str
    versions: Mapping[str, str]
    settings: Mapping[str, object]
    rows: list[Row]
    gradient_bytes: int
    all_reduce_seconds: list[float]  # of two processes, fp32
    workers: int  # processes of the largest launch

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Read a ``training_speed.json``."""
        values = json.loads(path.read_text())
        values["rows"] = [
            Row(
                row["processes"],
                row["threads"],
                Contender(**row["contender"]),
                [Speed(**speed) for speed in row["speeds"]],
            )
            for row in values["rows"]
        ]
        return cls(**values)

    @property
    def repeats(self) -> int:
        """Number of completed repeats."""
        return len(self.rows[0].speeds)

    def find(self, processes: int, threads: int | None = None, **fields: object) -> Row | None:
        """Return the row of the contender with these fields, and defaults for the others."""
        for row in self.rows:
            expected = asdict(Contender(**{"batch_size": self.settings["batch_size"]} | fields))  # type: ignore[arg-type]
            if row.processes == processes and threads in (None, row.threads) and asdict(row.contender) == expected:
                return row
        return None


def main(args: MeasureOptions) -> None:
    """Measure, print the tables, and write JSON and figures."""
    if args.plan:
        run_plan(args.plan)
    elif args.gpu_suite:
        run_gpu_suite(args)
    elif args.redraw:
        report(Results.read(args.output / RESULTS_FILE), args.output)
    else:
        args.output.mkdir(parents=True, exist_ok=True)
        report(compare(args), args.output)


# --- measuring


def precisions() -> list[Precision]:
    """Return both precisions, or fp32 alone if matrix products are slower in bf16."""
    rates = {}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        matrix = torch.ones(1024, 1024, dtype=dtype, device=Alone.device)
        began = math.nan
        for repeat in range(11):
            if repeat == 1:
                began = time.monotonic()
            (matrix @ matrix)[0, 0].item()
        rates[precision] = 10 * 2 * 1024**3 / (time.monotonic() - began)
    if rates["bf16"] >= rates["fp32"]:
        return ["fp32", "bf16"]
    print(
        f"bf16 is left out: {rates['bf16'] / 1e9:.0f} GFLOP/s here, and fp32 {rates['fp32'] / 1e9:.0f}; "
        "--precisions fp32 --precisions bf16 measures it anyway"
    )
    return ["fp32"]


def contenders(args: MeasureOptions) -> list[Row]:
    """Return the contenders to compare."""
    cores = os.cpu_count() or 1
    alone, shared = (1, cores), (args.processes, max(cores // args.processes, 1))
    rows = []
    common: dict[str, Any] = {"loop": "ours", "batch_size": args.batch_size}
    parts = {"micro_batch_size": args.micro_batch_size}

    def add(place: tuple[int, int], **fields: Any) -> None:
        rows.append(Row(*place, Contender(**(common | fields))))

    for precision in args.precisions or precisions():
        for data in ("squad", "mlm"):
            add(alone, data=data, layout="shuffled", loop="Trainer", precision=precision)
            add(alone, data=data, layout="shuffled", loop="Trainer", precision=precision, **parts)
            add(alone, data=data, layout="shuffled", precision=precision)
            add(alone, data=data, layout="bucketed", precision=precision)
            add(alone, data=data, layout="bucketed", precision=precision, **parts)
            if precision == "fp32" and args.compile:
                add(alone, data=data, layout="bucketed", compile=True)
        for place in dict.fromkeys([(1, shared[1]), shared]):
            if place != alone:
                add(place, data="squad", layout="bucketed", precision=precision, **parts)
    add(alone, data="squad", layout="padded to the maximum", loop="Trainer")
    add(alone, data="mlm", layout="packed")
    add(alone, data="mlm", layout="bucketed", optimizer="lamb")
    lamb = {"optimizer": "lamb", "batch_size": args.sequences, "micro_batch_size": args.batch_size}
    add(alone, data="mlm", layout="bucketed", **lamb)
    add(shared, data="squad", layout="bucketed", compression="fp16", **parts)
    return rows


def compare(args: MeasureOptions) -> Results:
    """Measure all contenders in turn, in each repeat; those that share a launch take turns within it.

    Raises:
        SystemExit: ``--output`` contains the results of another comparison.
    """
    path = args.output / RESULTS_FILE
    names = ("sequences", "batch_size", "micro_batch_size")
    settings: dict[str, object] = {name: getattr(args, name) for name in names}
    results = Results(
        machine=machine(),
        date=str(date.today()),
        versions=versions(),
        settings=settings | {"config": args.config or "mini", "data": args.data.name},
        rows=contenders(args),
        gradient_bytes=0,
        all_reduce_seconds=[],
        workers=args.processes,
    )
    if path.exists():
        results = resumed(Results.read(path), results, path)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        recipe = {"max_seq_len": 128, "max_predictions_per_seq": 20}
        pairs = real_pairs(args.data, args.tokenizer, args.sequences)
        write_pairs(pairs, directory / "shards", args.tokenizer, **recipe)
        plan: dict[str, Any] = {"config": results.settings["config"], "sequences": args.sequences}
        plan |= {"data": str(args.data), "tokenizer": str(args.tokenizer), "shards": str(directory / "shards")}
        while results.repeats < args.repeats:
            results = measured_again(results, plan, directory)
            save_json(path, asdict(results))
    return results


def resumed(found: Results, expected: Results, path: Path) -> Results:
    """Load earlier repeats, if they are of the same comparison."""
    for name in ("machine", "versions", "settings", "workers"):
        if getattr(found, name) != getattr(expected, name):
            raise SystemExit(f"{path}: was measured with another {name}, {getattr(found, name)}; give another --output")
    if [replace(row, speeds=[]) for row in found.rows] != expected.rows:
        raise SystemExit(f"{path}: compares other rows; give another --output")
    return found


def measured_again(results: Results, plan: Mapping[str, Any], directory: Path) -> Results:
    """Return the results with one more repeat."""
    repeat = results.repeats
    rows, all_reduces, gradient_bytes = {}, list(results.all_reduce_seconds), 0
    for processes, threads in dict.fromkeys((row.processes, row.threads) for row in results.rows):
        print(f"repeat {repeat + 1}: {processes} x {threads} threads", file=sys.stderr, flush=True)
        here = [n for n, row in enumerate(results.rows) if (row.processes, row.threads) == (processes, threads)]
        order = here[:: 1 if repeat % 2 == 0 else -1]  # alternate, so that none is always first
        contenders = [asdict(results.rows[number].contender) for number in order]
        found = launch(processes, threads, {**plan, "contenders": contenders}, directory)
        for number, speed in zip(order, found["speeds"], strict=True):
            row = results.rows[number]
            rows[number] = replace(row, speeds=[*row.speeds, Speed(**speed)])
        gradient_bytes = found["gradient_bytes"]
        if processes > 1:
            all_reduces.append(found["all_reduce_seconds"])
    return replace(
        results,
        rows=[rows[number] for number in range(len(results.rows))],
        gradient_bytes=gradient_bytes,
        all_reduce_seconds=all_reduces,
    )


def launch(processes: int, threads: int, plan: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """Measure some contenders in separate processes."""
    path = directory / "plan.json"
    save_json(path, dict(plan))
    command = [sys.executable, "-m", "training.measure_training", "--plan", str(path)]
    if processes > 1:
        horovodrun = Path(sys.executable).with_name("horovodrun")
        command = [str(horovodrun), "-np", str(processes), "--gloo", *command]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(path.with_name("results.json").read_text())
    return found


def run_plan(path: Path) -> None:
    """Measure the contenders of a plan, as one process of a launch."""
    plan = json.loads(path.read_text())
    workers = start_workers()
    tokenizer = Tokenizer.from_file(plan["tokenizer"])
    shards = ShardSet.open(Path(plan["shards"]))
    workload = Workload(
        config=new_config(plan["config"], shards.manifest.vocab_size),
        tokenizer=tokenizer,
        features=real_features(Path(plan["data"]), tokenizer, plan["sequences"]),
        shards=shards,
    )
    speeds = []
    for values in plan["contenders"]:
        contender = Contender(**values)
        steps = plan["sequences"] // (contender.batch_size * workers.size)
        warm_up = steps if contender.compile else 1  # each length is compiled before steps are counted
        speeds.append(asdict(measure(contender, workload, workers, steps, warm_up)))
    weights = workload.model(Contender(loop="ours", data="squad", layout="bucketed")).parameters()
    found = {
        "speeds": speeds,
        "gradient_bytes": sum(4 * weight.numel() for weight in weights),
        "all_reduce_seconds": all_reduce_seconds(workload, workers, "none") if workers.size > 1 else 0.0,
    }
    if workers.rank == 0:
        save_json(path.with_name("results.json"), found)


def machine() -> str:
    """Describe this machine."""
    names = [line.split(":", 1)[1].strip() for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")]
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    memory = psutil.virtual_memory().total / 2**30
    parts = [f"{os.cpu_count()} cores of {names[0] if names else platform.processor()}", f"{memory:.0f} GiB", *gpus]
    return ", ".join(parts)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide the speed."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "accelerate", "horovod"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


# --- reporting


def report(results: Results, directory: Path) -> None:
    """Print the tables and draw the figures."""
    settings = results.settings
    print(f"{results.date}, {results.machine}")
    print(", ".join(f"{name} {number}" for name, number in results.versions.items()))
    print(
        f"BERT {settings['config']}, {settings['sequences']} sequences an epoch, {settings['batch_size']} a step and "
        f"process, {results.repeats} repeats; MFU of the measured peak of a matrix product\n"
    )
    print("\n".join(speed_table(results)), end="\n\n")
    print("\n".join(findings(results)), end="\n\n")
    for path in draw(results, directory):
        print(path)


def speed_table(results: Results) -> list[str]:
    """Format all rows, each next to the default ``Trainer`` at the same precision: whole batches, in random order."""
    lines = [
        "| data | loop | processes x threads | batches | precision | optimizer | batch | seq/s | MFU | optimizer | "
        "x Trainer |",
        "|---|---|---|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in sorted(results.rows, key=lambda row: (row.contender.data != "squad", row.contender.loop == "ours")):
        contender = row.contender
        trainer = results.find(1, loop="Trainer", data=contender.data, layout="shuffled", precision=contender.precision)
        wire = ", fp16 on the wire" if contender.compression == "fp16" else ""
        compiled = ", compiled" if contender.compile else ""
        parts = f" in {contender.micro_batch_size}s" if contender.micro_batch_size else ""
        lines.append(
            f"| {'SQuAD' if contender.data == 'squad' else 'MLM + NSP'} | {contender.loop} | "
            f"{row.processes} x {row.threads} | {contender.layout} | {contender.precision}{compiled}{wire} | "
            f"{contender.optimizer} | {contender.batch_size * row.processes}{parts} | {spread(row.rates)} | "
            f"{row.median('mfu'):.0%} | {row.median('optimizer_seconds') / row.median('step_seconds'):.1%} | "
            f"{'' if trainer in (None, row) else spread(ratios(row, trainer), 2)} |"
        )
    return lines


def findings(results: Results) -> list[str]:
    """Summarize the rows, with the numbers of each finding."""
    said = []

    def compared(what: str, row: Row | None, other: Row | None, goal: str = "") -> None:
        if row and other:
            said.append(f"- {what}: {spread(ratios(row, other), 2)} times as fast{goal}")

    threads = max(row.threads for row in results.rows if row.processes == 1)
    parts = results.settings["micro_batch_size"]
    for data, name in (("squad", "SQuAD"), ("mlm", "MLM + NSP")):

        def found(loop: str, layout: str, precision: str, parts: object = None, data: str = data) -> Row | None:
            fields = {"data": data, "layout": layout, "precision": precision, "micro_batch_size": parts}
            return results.find(1, threads, loop=loop, **fields)

        best = {precision: found("ours", "bucketed", precision, parts) for precision in ("fp32", "bf16")}
        for precision, row in best.items():
            what = f"{name}, our loop with {precision}, batches of like length in micro-batches of {parts}, against"
            for other in best:
                goal = f"; goal {GOAL}" if precision == "bf16" else ""
                compared(f"{what} the Trainer with {other}", row, found("Trainer", "shuffled", other), goal)
            compared(f"{what} the Trainer's", row, found("Trainer", "shuffled", precision, parts))
            compared(f"{what} whole ones", row, found("ours", "bucketed", precision))
        compared(f"{name}, bf16 against fp32", best["bf16"], best["fp32"])
        compiled = results.find(1, threads, loop="ours", data=data, layout="bucketed", compile=True)
        compared(f"{name}, bucketed, compiled against not, fp32", compiled, found("ours", "bucketed", "fp32"))
        shuffled = found("ours", "shuffled", "fp32")
        for layout in ("bucketed", "packed"):
            compared(f"{name}, {layout} against shuffled, fp32", found("ours", layout, "fp32"), shuffled)
    padded = results.find(1, loop="Trainer", data="squad", layout="padded to the maximum")
    bucketed = results.find(1, threads, loop="ours", data="squad", layout="bucketed")
    compared("SQuAD, fp32, against the Trainer that pads all windows to 384 tokens", bucketed, padded)
    for row in results.rows:
        if row.contender.optimizer == "lamb":
            share = row.median("optimizer_seconds") / row.median("step_seconds")
            said.append(
                f"- LAMB's update takes {1000 * row.median('optimizer_seconds'):.1f} ms, {share:.1%} of a step of "
                f"{row.contender.batch_size} sequences; goal at most {LAMB_GOAL:.0%}"
            )
    for precision, model, measured in cost_models(results):
        predicted = results.workers * model.batch_per_worker / model.step_seconds(results.workers)
        said.append(
            f"- {results.workers} processes, {precision}: {spread(measured.rates)} sequences per second; the cost "
            f"model says {predicted:.1f} (gradients of {model.gradient_bytes / 1e6:.0f} MB, "
            f"{1000 * statistics.median(results.all_reduce_seconds):.0f} ms to sum them, "
            f"{model.bandwidth / 1e9:.2f} GB/s)"
        )
    return said


def cost_models(results: Results) -> list[tuple[str, CostModel, Row]]:
    """Return per precision this machine's cost model, with a process as a worker, and the row of most processes."""
    found = []
    seconds = statistics.median(results.all_reduce_seconds)
    same: dict[str, Any] = {"loop": "ours", "data": "squad", "layout": "bucketed"}
    for precision in ("fp32", "bf16"):
        fields = same | {"precision": precision, "micro_batch_size": results.settings["micro_batch_size"]}
        together = results.find(results.workers, **fields)
        if together and (one := results.find(1, together.threads, **fields)):
            ring = 2 * (results.workers - 1) / results.workers * results.gradient_bytes
            model = CostModel(
                sequences_per_second=one.median("sequences_per_second"),
                batch_per_worker=one.contender.batch_size,
                gradient_bytes=results.gradient_bytes,
                bandwidth=ring / seconds,
            )
            found.append((precision, model, together))
    return found


def draw(results: Results, directory: Path) -> list[Path]:
    """Draw training time over workers, our loop against the ``Trainer``, and single against mixed precision.

    The last figure is drawn only if both precisions were measured.
    """
    note = f"{results.machine}; {results.date}; BERT {results.settings['config']}"
    times, precisions, trainer = (
        directory / f"training_{name}.png" for name in ("time_and_workers", "precision", "and_trainer")
    )
    lines = []
    for (precision, model, together), color in zip(cost_models(results), ("tab:blue", "tab:orange"), strict=False):
        measured = {1: model.sequences_per_second, results.workers: together.median("sequences_per_second")}
        lines.append(Line(f"{precision}, this machine", color, model, measured))
        network = replace(model, bandwidth=NETWORK, latency=NETWORK_LATENCY)
        lines.append(Line(f"{precision}, 100 Gbit/s network", f"dark{color[4:]}", network, {}))
    assumed = "model: compute of one worker + 2(n-1)/n of the gradients' bytes over the bandwidth, no overlap"
    title = f"Two epochs of SQuAD v1.1, {results.settings['batch_size']} windows a worker and step"
    plot_training_time(times, lines, JOB, title, f"{note}\n{assumed}")

    threads = max(row.threads for row in results.rows if row.processes == 1)
    bars: dict[str, dict[str, list[float]]] = {}
    versus: dict[str, dict[str, list[float]]] = {}
    for row in results.rows:
        contender = row.contender
        name = "SQuAD" if contender.data == "squad" else "MLM + NSP"
        if contender.optimizer == "lamb" or contender.compression == "fp16":
            continue
        parts = f", in {contender.micro_batch_size}s" if contender.micro_batch_size else ""
        if parts:
            who = f"{name}\n{contender.loop}\n{contender.layout}\n{row.processes} x {row.threads}"
            bars.setdefault(who, {})[contender.precision] = row.rates
        if row.processes == 1 and row.threads == threads:
            series = f"{contender.loop}, {contender.layout}{parts}{', compiled' if contender.compile else ''}"
            versus.setdefault(f"{name}, {contender.precision}", {})[series] = row.rates
    plot_speeds(trainer, versus, "Our loop and the Hugging Face Trainer, one process", note)
    both = {who: rates for who, rates in bars.items() if len(rates) > 1}
    if not both:
        return [times, trainer]
    title = f"Single and mixed precision, in micro-batches of {results.settings['micro_batch_size']}"
    plot_speeds(precisions, both, title, note)
    return [times, trainer, precisions]


def ratios(row: Row, other: Row) -> list[float]:
    """Return the speed ratio of each repeat."""
    return [ours / theirs for ours, theirs in zip(row.rates, other.rates, strict=True)]


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Format the median, smallest and largest value: ``1.50 (1.40-1.60)``."""
    median = f"{statistics.median(values):.{digits}f}"
    return median if len(values) == 1 else f"{median} ({min(values):.{digits}f}-{max(values):.{digits}f})"


# --- GPUs


def run_gpu_suite(args: MeasureOptions) -> None:
    """Measure BERT-large, and print the numbers next to the published ones."""
    workers = start_workers()
    vocabulary = Tokenizer.from_file(str(args.tokenizer)).get_vocab_size()
    config = new_config(args.config or "large", vocabulary + -vocabulary % 8)
    rows: list[dict[str, Any]] = []
    for name, row in GPU_SUITE.items():
        contender = replace(row.contender, compile=args.compile)
        warm_up, steps, tokens = row.warm_up, row.steps, row.tokens
        if args.quick:
            contender, warm_up, steps = replace(contender, batch_size=4, micro_batch_size=2), 1, 1
        count = 2 * contender.batch_size * workers.size
        with tempfile.TemporaryDirectory() as directory:
            recipe = {"max_seq_len": tokens, "max_predictions_per_seq": max(row.max_predictions_per_seq, 1)}
            shards = write_pairs(
                full_pairs(count, tokens, vocabulary), Path(directory) / "shards", args.tokenizer, **recipe
            )
            features = full_features(count, tokens, vocabulary)
            workload = Workload(config, Tokenizer.from_file(str(args.tokenizer)), features, shards)
            speed = measure(contender, workload, workers, steps, warm_up)
        rows.append({"name": name, "tokens": tokens, "contender": asdict(contender), "speed": asdict(speed)})
        if workers.rank == 0:
            print(f"{name}: {speed.sequences_per_second:.1f} sequences per second", file=sys.stderr, flush=True)
    if workers.rank:
        return
    args.output.mkdir(parents=True, exist_ok=True)
    found = {"machine": machine(), "date": str(date.today()), "versions": versions(), "processes": workers.size}
    save_json(args.output / GPU_RESULTS_FILE, found | {"config": config.to_diff_dict(), "rows": rows})
    print(f"{found['date']}, {found['machine']}, {workers.size} processes, BERT {args.config or 'large'}\n")
    print("| | tokens | seq/s | seq/s a GPU | MFU | optimizer | GPU memory | A100-80G, published | x | goal |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---|")
    for measured, row in zip(rows, GPU_SUITE.values(), strict=True):
        speed = Speed(**measured["speed"])
        each = speed.sequences_per_second / workers.size
        goal = f"{row.goal}x" + (f", MFU {row.mfu_goal:.0%}" if row.mfu_goal else "")
        print(
            f"| {measured['name']} | {row.tokens} | {speed.sequences_per_second:.1f} | {each:.1f} | {speed.mfu:.1%} | "
            f"{speed.optimizer_seconds / speed.step_seconds:.1%} | {speed.gpu_bytes / 2**30:.0f} GiB | "
            f"{row.published:.0f} | {each / row.published:.2f} | {goal} |"
        )
