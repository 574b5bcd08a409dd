"""Report a run: a line of JSON every few steps, speed as a share of the hardware's peak, and a plot of the loss.

``python -m training.metrics runs/one runs/other --output losses.png`` draws the loss of several runs on the same axes.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

METRICS_FILE = "metrics.jsonl"
LOSS_PLOT = "loss.png"
SHOWN = ("loss", "sequences_per_second", "mfu")
"""Fields of a record that the progress bar shows."""

PUBLISHED_PEAKS = {"A100": 312e12, "A30": 165e12, "L40S": 362e12, "L4": 121e12, "V100": 125e12, "T4": 65e12}
PUBLISHED_PEAKS |= {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
"""Dense tensor-core FLOPs per second in 16 bits from NVIDIA's data sheets, by a part of the device's name."""


class Metrics:
    """Writes and shows the records of a run; only one process has it."""

    def __init__(self, directory: Path, step: int, steps: int, *, tensorboard: bool = False) -> None:
        """Continue a run's records.

        Args:
            directory: directory of ``metrics.jsonl`` and TensorBoard's files; created if missing.
            step: number of steps done; records of later steps, which a killed run lost, are removed.
            steps: number of steps in the whole run.
            tensorboard: write for TensorBoard too.
        """
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / METRICS_FILE
        kept = [record for record in read_metrics(path) if record["step"] <= step]
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(partial, path)
        self._file = path.open("a", buffering=1)  # line-buffered
        self._progress = tqdm(total=steps, initial=step, unit="step", mininterval=5)
        self._tensorboard: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - an optional package
            except ImportError as error:
                raise SystemExit("--tensorboard: needs the package tensorboard; pip install tensorboard") from error
            self._tensorboard = SummaryWriter(str(directory), purge_step=step + 1)

    def advance(self) -> None:
        """Count a step."""
        self._progress.update()

    def write(self, step: int, record: Mapping[str, float]) -> None:
        """Write the record of the steps up to this one; values that are not finite become null."""
        rounded = {name: float(f"{value:.6g}") if math.isfinite(value) else None for name, value in record.items()}
        self._file.write(json.dumps({"step": step} | rounded) + "\n")
        self._progress.set_postfix({name: f"{record[name]:.4g}" for name in SHOWN if name in record})
        if self._tensorboard:
            for name, value in record.items():
                self._tensorboard.add_scalar(name, value, step)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.close()
        self._file.close()
        if self._tensorboard:
            self._tensorboard.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the records of a run; a missing file has none, and a last line truncated by a crash is ignored."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records


def plot_loss(directory: Path) -> None:
    """Plot the loss, and its terms if there are several, over the steps from ``metrics.jsonl`` into ``loss.png``."""
    records = read_metrics(directory / METRICS_FILE)
    if records:
        terms = [name for name in records[-1] if name.endswith("_loss")]
        names = ["loss", *terms] if len(terms) > 1 else ["loss"]
        _plot(directory / LOSS_PLOT, ((name, records, name) for name in names))


def plot_runs(path: Path, runs: Sequence[Path], value: str = "loss") -> None:
    """Plot one value of several runs over their steps; each line is named after its run's directory.

    Args:
        path: the PNG to write.
        runs: output directories of the runs.
        value: name of a value in ``metrics.jsonl``.

    Raises:
        SystemExit: a run has no such value.
    """
    records = {run: read_metrics(run / METRICS_FILE) for run in runs}
    for run, lines in records.items():
        if not any(value in line for line in lines):
            raise SystemExit(f"{run / METRICS_FILE}: has no {value}")
    _plot(path, ((run.name, lines, value) for run, lines in records.items()), label=value)


def _plot(
    path: Path, lines: Iterable[tuple[str, Sequence[Mapping[str, float | None]], str]], *, label: str = "loss"
) -> None:
    """Plot lines; each has a name, the records of a run, and the name of the value to plot."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - slow to import, and needed once

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel=label)
    for name, records, value in lines:
        points = [(record["step"], record[value]) for record in records if record.get(value) is not None]
        axes.plot(*zip(*points, strict=True), label=name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


@functools.cache
def peak_flops(device: torch.device, precision: str) -> float:
    """Return the peak FLOPs per second of this process's device.

    For a known GPU in 16 bits this is the published peak. Otherwise it is measured with a large product of square
    matrices, in fp32 if that is faster. If several processes share a CPU, all of them should measure at once.
    """
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    if device.type == "cuda" and precision != "fp32":
        name = torch.cuda.get_device_name(device)
        for part, flops in PUBLISHED_PEAKS.items():
            if re.search(rf"\b{part}\b", name):
                return flops
    size = 8192 if device.type == "cuda" else 1024
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    seconds = math.inf
    until = time.monotonic() + 0.3
    while time.monotonic() < until:
        began = time.monotonic()
        product = matrix @ matrix
        product[0, 0].item()  # waits for the GPU
        seconds = min(seconds, time.monotonic() - began)
    flops = 2 * size**3 / seconds
    return flops if precision == "fp32" else max(flops, peak_flops(device, "fp32"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="output directory of a job")
    parser.add_argument("--output", type=Path, required=True, help="PNG to write")
    parser.add_argument("--value", default="loss", help="of metrics.jsonl; default: %(default)s")
    arguments = parser.parse_args()
    plot_runs(arguments.output, arguments.runs, arguments.value)
