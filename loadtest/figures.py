"""Figures of the load tests: throughput and latency against clients, and where the time goes."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot, so that no window opens
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from loadtest.points import STAGES, Point, curve_of, knee

_COLORS = ("#1b9e77", "#d95f02", "#7570b3", "#e7298a", "#66a61e")
_MARKERS = ("o", "s", "^", "D", "v")
_STAGE_NAMES = {
    "http_ms": "HTTP, balancer, client",
    "tokenize_ms": "tokenize",
    "line_ms": "service's line, gRPC",
    "queue_ms": "Triton's queue",
    "compute_ms": "engine",
    "decode_ms": "decode",
}
_PLAIN_NUMBERS = FuncFormatter(lambda value, _: f"{value:g}")


def draw_throughput(points: Sequence[Point], title: str) -> Figure:
    """Draw throughput against clients; p50, p95, p99 and the refused share below; a line for each number of replicas.

    One column for each number of engine instances; bands reach from the slowest to the fastest part of a measurement;
    rings are knees.
    """
    closed = [each for each in points if each.phase == "closed"]
    columns = sorted({each.instances for each in closed})
    figure = Figure(figsize=(1.5 + 4.6 * len(columns), 10), layout="constrained")
    axes = figure.subplots(5, len(columns), sharex=True, sharey="row", squeeze=False, height_ratios=(6, 3, 3, 3, 2))
    figure.suptitle(title, fontsize=11)
    for column, instances in enumerate(columns):
        upper, *lower, refused = axes[:, column]
        peak = max(each.throughput for each in closed if each.instances == instances)
        for n, replicas in enumerate(sorted({each.replicas for each in closed if each.instances == instances})):
            curve = curve_of(closed, instances=instances, replicas=replicas)
            clients = list(curve)
            style: dict[str, Any] = {"color": _COLORS[n % 5], "marker": _MARKERS[n % 5], "markersize": 4}
            label = f"{replicas} replica{'s' if replicas > 1 else ''} of the service"
            upper.plot(clients, [each.throughput for each in curve.values()], label=label, **style)
            band = [[getattr(each, f"throughput_{end}") for each in curve.values()] for end in ("low", "high")]
            upper.fill_between(clients, *band, color=_COLORS[n % 5], alpha=0.12, linewidth=0)
            at = knee({number: each.throughput for number, each in curve.items()})
            ring = {"color": _COLORS[n % 5], "marker": "o", "markersize": 11, "fillstyle": "none", "linestyle": "none"}
            upper.plot([at], [curve[at].throughput], **ring)
            for panel, percent in zip(lower, (50, 95, 99), strict=True):
                panel.plot(clients, [getattr(each, f"p{percent}_ms") for each in curve.values()], **style)
            refused.plot(clients, [100 * _refused_share(each) for each in curve.values()], **style)
        every = sorted({each.clients for each in closed})
        upper.set_title(f"{instances} engine instance{'s' if instances > 1 else ''}", fontsize=10)
        upper.set_ylim(0, 1.08 * max(each.throughput_high for each in closed))
        upper.plot([], [], color="gray", marker="o", markersize=11, fillstyle="none", linestyle="none", label="knee")
        upper.legend(fontsize=8, loc="lower right")
        for panel, percent in zip(lower, (50, 95, 99), strict=True):
            panel.plot(every, [1e3 * each / peak for each in every], color="gray", linewidth=0.8, linestyle=":")
            _milliseconds(panel)
            if not column:
                panel.set_ylabel(f"p{percent}, ms")
        refused.set_ylim(-5, 105)
        refused.set_xlabel("clients, each waiting for its answer (dotted: clients / peak throughput)", fontsize=8)
        _count_in_twos(refused, every)
        for panel in axes[:, column]:
            panel.grid(alpha=0.3, linewidth=0.5)
            panel.tick_params(labelsize=8)
    axes[0, 0].set_ylabel("right answers/s")
    axes[-1, 0].set_ylabel("refused, %")
    return figure


def draw_latency(points: Sequence[Point], title: str) -> Figure:
    """Draw the stages of a request against clients, and latency at fixed rates of arrivals."""
    closed = [each for each in points if each.phase == "closed"]
    opened = sorted((each for each in points if each.phase == "open"), key=lambda each: each.rate)
    replicas, instances = _reference(closed)
    curve = curve_of(closed, instances=instances, replicas=replicas)
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    figure.suptitle(title, fontsize=11)
    left, right = figure.subplots(1, 2)
    clients = list(curve)
    places, bottom = np.arange(len(clients)), np.zeros(len(clients))
    for n, stage in enumerate(STAGES):
        share = np.nan_to_num([getattr(each, stage) / _mean_ms(each) for each in curve.values()]) * 100
        color = mpl.colormaps["tab10"](n)
        left.bar(places, share, 0.8, bottom=bottom, label=_STAGE_NAMES[stage], color=color)
        bottom += share
    for place, each in zip(places, curve.values(), strict=True):
        left.text(place, 101, f"{_mean_ms(each):.3g} ms", ha="center", fontsize=7)
    left.set_xticks(places, [str(each) for each in clients])
    left.set_xlabel("clients, each waiting for its answer")
    left.set_ylabel("share of the mean latency, %")
    left.set_ylim(0, 108)
    left.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.13))
    left.set_title(f"{_numbered(replicas, 'replica')}, {_numbered(instances, 'engine instance')}: stages", fontsize=10)
    for n, percent in enumerate((50, 95, 99)):
        values = [getattr(each, f"p{percent}_ms") for each in opened]
        right.plot([each.rate for each in opened], values, color=_COLORS[n], marker=_MARKERS[n], label=f"p{percent}")
    if curve:
        right.axvline(max(each.throughput for each in curve.values()), color="gray", linestyle=":", linewidth=1)
        right.text(0.99, 0.02, "dotted: peak of the closed loop", transform=right.transAxes, ha="right", fontsize=8)
    if opened:
        _milliseconds(right)
    right.set_xlabel("arrivals/s wanted, answered or not (Poisson)")
    right.set_ylabel("latency since due, ms")
    right.set_title("the same servers at a fixed rate", fontsize=10)
    right.grid(alpha=0.3, linewidth=0.5)
    if opened:
        right.legend(fontsize=8)
    return figure


Curve = Mapping[int, tuple[float, float]]
"""By number of clients: answers/s, and the 99th percentile of latency in milliseconds."""


def draw_engines(alone: Mapping[str, Curve], served: Mapping[str, Curve], title: str) -> Figure:
    """Draw throughput and p99 of several engines against clients: called directly, and through the service."""
    figure = Figure(figsize=(9.5, 6), layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(2, 2, sharex=True, sharey="row", height_ratios=(3, 2))
    for (upper, lower), curves, name in zip(axes.T, (alone, served), ("engine alone", "through REST"), strict=True):
        for n, (label, curve) in enumerate(curves.items()):
            style: dict[str, Any] = {"color": _COLORS[n % 5], "marker": _MARKERS[n % 5], "markersize": 4}
            upper.plot(list(curve), [rate for rate, _ in curve.values()], label=label, **style)
            lower.plot(list(curve), [p99 for _, p99 in curve.values()], **style)
        upper.set_title(name, fontsize=10)
        upper.legend(fontsize=8, loc="lower right")
        _milliseconds(lower)
        lower.set_xlabel("clients, each waiting for its answer", fontsize=8)
        _count_in_twos(lower, sorted({clients for curve in curves.values() for clients in curve}))
        for panel in (upper, lower):
            panel.grid(alpha=0.3, linewidth=0.5)
            panel.tick_params(labelsize=8)
    axes[0, 0].set_ylim(bottom=0)
    axes[0, 0].set_ylabel("answers/s")
    axes[1, 0].set_ylabel("p99, ms")
    return figure


def _refused_share(point: Point) -> float:
    return point.shed / max(sum(point.outcomes.values()), 1)


def _reference(closed: Sequence[Point]) -> tuple[int, int]:
    """Replicas and instances of the curve shown in detail: fewest replicas, most instances."""
    return min(each.replicas for each in closed), max(each.instances for each in closed)


def _mean_ms(point: Point) -> float:
    return float(np.nansum([getattr(point, stage) for stage in STAGES]))


def _numbered(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' if count > 1 else ''}"


def _milliseconds(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(_PLAIN_NUMBERS)
    axes.yaxis.set_minor_formatter(NullFormatter())


def _count_in_twos(axes: Axes, ticks: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(each) for each in ticks])
    axes.minorticks_off()
