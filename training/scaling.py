"""Model how training time falls with the number of workers, and plot the model next to measurements.

The model's results hold for the stated compute and network. Its lines are dashed and labelled "model"; measurements are
points.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class CostModel:
    """A step of data-parallel training: the compute of one worker's share, then one ring all-reduce of all gradients.

    Nothing overlaps, which is the worst case: Horovod starts to reduce while the backward pass still runs. Workers are
    assumed to be equal, and to slow each other down only by the network.
    """

    sequences_per_second: float  # of one worker alone
    batch_per_worker: int  # sequences per worker and step
    gradient_bytes: float  # bytes sent: 4 per weight, 2 with fp16 compression
    bandwidth: float  # bytes per second that each worker sends, and receives at the same time
    latency: float = 0.0  # seconds per message

    def all_reduce_seconds(self, workers: int) -> float:
        """Seconds of a ring all-reduce: 2 (n - 1) messages of 1/n of the bytes each (Patarasuk and Yuan 2009)."""
        messages = 2 * (workers - 1)
        return messages * (self.gradient_bytes / workers / self.bandwidth + self.latency)

    def step_seconds(self, workers: int) -> float:
        """Seconds of a step: compute, then all-reduce."""
        return self.batch_per_worker / self.sequences_per_second + self.all_reduce_seconds(workers)

    def hours(self, workers: int, sequences: int) -> float:
        """Hours of a run over the given number of sequences, with a fixed batch per worker."""
        return math.ceil(sequences / (workers * self.batch_per_worker)) * self.step_seconds(workers) / 3600


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the training time figure, with its measured points."""

    label: str
    color: str
    model: CostModel
    measured: Mapping[int, float]  # workers -> total sequences per second


def plot_training_time(path: Path, lines: Sequence[Line], sequences: int, title: str, note: str) -> None:
    """Plot the hours of a run over the number of workers, with both axes logarithmic."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="workers", ylabel="hours", xscale="log", yscale="log", title=title)
    counts = [2**power for power in range(7)]
    for line in lines:
        hours = [line.model.hours(count, sequences) for count in counts]
        axes.plot(counts, hours, "--", color=line.color, alpha=0.7, label=f"{line.label}: model")
        if line.measured:
            points = [(count, sequences / rate / 3600) for count, rate in line.measured.items()]
            axes.plot(*zip(*points, strict=True), "o", color=line.color, label=f"{line.label}: measured")
    axes.set_xticks(counts, [str(count) for count in counts], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.supxlabel(note, fontsize=8)
    figure.savefig(path, dpi=120)


def plot_speeds(path: Path, groups: Mapping[str, Mapping[str, Sequence[float]]], title: str, note: str) -> None:
    """Plot sequences per second as bars: the median of the repeats, with the smallest and largest as whiskers.

    Args:
        path: the image to write.
        groups: groups of bars by label; each maps the meaning of a colour to its repeats.
        title: title of the figure.
        note: text below the figure: machine and date.
    """
    series = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    figure = Figure(figsize=(max(9, 0.4 * len(groups) * len(series)), 5), layout="constrained")
    axes = figure.add_subplot(ylabel="sequences per second", title=title)
    width = 0.8 / len(series)
    for number, name in enumerate(series):
        drawn: list[tuple[float, Sequence[float]]] = [
            (at + (number - (len(series) - 1) / 2) * width, sorted(bars[name]))
            for at, bars in enumerate(groups.values())
            if name in bars
        ]
        heights = [repeats[len(repeats) // 2] for _, repeats in drawn]
        spread: Any = [
            [height - repeats[0] for height, (_, repeats) in zip(heights, drawn, strict=True)],
            [repeats[-1] - height for height, (_, repeats) in zip(heights, drawn, strict=True)],
        ]
        bars = axes.bar([place for place, _ in drawn], heights, width, yerr=spread, capsize=3, label=name)
        axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside right upper")
    figure.supxlabel(note, fontsize=8)
    figure.savefig(path, dpi=120)
