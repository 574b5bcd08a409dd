"""What a load test measured: samples become points, points become curves with a knee, a table, figures and a page."""

import base64
import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import jinja2
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot there is no window to open
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from loadtest.replies import ERROR, RIGHT, SHED, WRONG, Sample

KNEE = 0.95
"""The knee of a curve is its smallest number of clients at which throughput is at least this share of its peak."""
SLICES = 4
"""Parts of a measurement whose lowest and highest throughput are told: how steady it was."""
_FEWEST = {50: 1, 95: 20, 99: 100}
"""Replies below which a percentile is not told."""

Phase = Literal["closed", "open", "workload", "scaling"]
STAGES = ("http_ms", "tokenize_ms", "line_ms", "queue_ms", "compute_ms", "decode_ms")


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is put on which servers; two that are equal are the same measurement."""

    phase: Phase
    replicas: int = 1  # of the service
    tritons: int = 1  # Triton servers; the n-th replica asks the n-th of them, going round
    instances: int = 2  # engines of each Triton server
    clients: int = 0  # of the closed loop; 0: a fixed rate
    share: float = 0.0  # of the closed loop's peak that is the rate
    mix: str = "short"
    repeat: str = "unique"


@dataclass(frozen=True, slots=True, kw_only=True)
class Point(Load):
    """A load and what it gave. Times are milliseconds; NaN stands for what cannot be told."""

    date: str  # ISO 8601, UTC
    commit: str
    seconds: float  # measured, after the warm-up
    rate: float = 0.0  # arrivals/s, where there is no closed loop
    throughput: float  # right answers/s
    throughput_low: float  # of the slowest of `SLICES` parts
    throughput_high: float
    p50_ms: float  # of right answers, from the moment when they were due
    p95_ms: float
    p99_ms: float
    max_ms: float
    late_p99_ms: float  # how much later than due the load's own client sent
    right: int  # of the whole run, warm-up included, as are the next
    shed: int  # refused with a time to come back
    wrong: int
    error: int
    windows: float  # mean of a request, as are all below
    http_ms: float  # everything outside the service's own clock: connection, balancer, HTTP, the client itself
    tokenize_ms: float
    line_ms: float  # of what the service calls infer: its own line, gRPC
    queue_ms: float  # Triton's; of one engine call, as the next
    compute_ms: float
    decode_ms: float
    cpu_service_ms: float  # CPU time for each right answer, as all below
    cpu_triton_ms: float
    cpu_haproxy_ms: float
    cpu_clients_ms: float
    memory_service_mib: float  # of all processes, after the run
    memory_triton_mib: float
    outcomes: Mapping[str, int] = field(default_factory=dict)
    kinds: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def load(self) -> Load:
        """What was measured, without what it gave."""
        return Load(**{each.name: getattr(self, each.name) for each in fields(Load)})


def read_samples(result: Mapping[str, Any]) -> list[Sample]:
    """The samples of a result file of the locustfile."""
    assert tuple(result["fields"]) == Sample._fields
    return [Sample(*each) for each in result["samples"]]


def summarize(
    load: Load,
    result: Mapping[str, Any],
    *,
    cpu_s: Mapping[str, float],
    engine: Mapping[str, float],
    memory_mib: Mapping[str, float],
    rate: float = 0.0,
    date: str,
    commit: str,
) -> Point:
    """Make a point of a run.

    Throughput counts right answers that came within the measured seconds; latencies are of the right answers to what
    was due in them, however late they came. Outcomes, stages and costs are of the whole run, as Triton's account is.

    Args:
        load: what was measured.
        result: the locustfile's result.
        cpu_s: seconds of CPU of the whole run, by role of the servers.
        engine: Triton's account of the whole run, as `loadtest.servers.Stack.engine_seconds`.
        memory_mib: by role, after the run.
        rate: arrivals/s.
        date: when it began.
        commit: of this repository.
    """
    samples = read_samples(result)
    began, seconds = float(result["began"]), float(result["seconds"])
    right = [each for each in samples if each.outcome == RIGHT]
    due = [each for each in right if began <= each.due < began + seconds]
    ended = np.array([each.ended for each in right])
    slices = np.histogram(ended, bins=SLICES, range=(began, began + seconds))[0] / (seconds / SLICES)
    outcomes = Counter(each.outcome for each in samples)
    groups = Counter(each.outcome.split()[0] for each in samples)
    latencies: dict[str, Any] = percentiles(due)
    stages = {
        stage: mean([getattr(each, f"{stage}_ms") for each in right])
        for stage in ("tokenize", "infer", "decode", "total")
    }
    calls = engine.get("calls") or float("nan")
    queue, compute = (1e3 * engine.get(f"{part}_s", float("nan")) / calls for part in ("queue", "compute"))
    windows = mean([each.windows for each in right])
    costs: dict[str, Any] = {
        f"cpu_{role}_ms": 1e3 * cpu_s.get(role, 0.0) / len(right) if right else float("nan")
        for role in ("service", "triton", "haproxy", "clients")
    }
    costs |= {f"memory_{role}_mib": memory_mib.get(role, float("nan")) for role in ("service", "triton")}
    return Point(
        **asdict(load),
        date=date,
        commit=commit,
        seconds=seconds,
        rate=rate,
        throughput=float(slices.mean()),
        throughput_low=float(slices.min()),
        throughput_high=float(slices.max()),
        **latencies,
        late_p99_ms=percentile([1e3 * (each.sent - each.due) for each in samples], 99),
        right=groups[RIGHT],
        shed=groups[SHED],
        wrong=groups[WRONG],
        error=groups[ERROR],
        windows=windows,
        http_ms=mean([1e3 * (each.ended - each.due) for each in right]) - stages["total"],
        tokenize_ms=stages["tokenize"],
        # Several windows are with Triton side by side, so that its times of one do not add up to the request's.
        line_ms=stages["infer"] - queue - compute if windows < 1.1 else float("nan"),
        queue_ms=queue,
        compute_ms=compute,
        decode_ms=stages["decode"],
        **costs,
        outcomes=dict(sorted(outcomes.items())),
        kinds={
            kind: {"requests": len(of_kind), **percentiles(of_kind)}
            for kind in sorted({each.kind for each in due})
            for of_kind in [[each for each in due if each.kind == kind]]
        },
    )


def percentiles(samples: Sequence[Sample]) -> dict[str, float]:
    """Latencies from the moment when requests were due, in milliseconds."""
    latencies = [1e3 * (each.ended - each.due) for each in samples]
    return {f"p{percent}_ms": percentile(latencies, percent) for percent in _FEWEST} | {
        "max_ms": max(latencies, default=float("nan"))
    }


def percentile(values: Sequence[float], percent: int) -> float:
    """A percentile; NaN where there are too few values to tell it."""
    return float(np.percentile(values, percent)) if len(values) >= _FEWEST[percent] else float("nan")


def mean(values: Sequence[float]) -> float:
    """The mean; NaN of nothing."""
    return float(np.mean(values)) if values else float("nan")


def knee(curve: Mapping[int, float]) -> int:
    """The smallest number of clients whose throughput is at least `KNEE` of the highest.

    From there on more clients only wait longer: by Little's law, latency is clients / throughput.

    Args:
        curve: throughput by number of clients.

    Raises:
        ValueError: the curve is empty.
    """
    if not curve:
        raise ValueError("curve: empty")
    peak = max(curve.values())
    return min(clients for clients, throughput in curve.items() if throughput >= KNEE * peak)


def curve_of(points: Iterable[Point], phase: Phase = "closed", **wanted: int) -> dict[int, Point]:
    """The points of one curve by number of clients, rising; ``wanted`` are fields of `Load`."""
    chosen = [each for each in points if each.phase == phase and all(getattr(each, k) == v for k, v in wanted.items())]
    return {each.clients: each for each in sorted(chosen, key=lambda each: each.clients)}


def knees(points: Sequence[Point]) -> list[dict[str, float]]:
    """Knee and peak of each closed-loop curve."""
    found = []
    for instances, replicas in sorted({(each.instances, each.replicas) for each in points if each.phase == "closed"}):
        curve = curve_of(points, instances=instances, replicas=replicas)
        at = knee({clients: point.throughput for clients, point in curve.items()})
        peak = max(point.throughput for point in curve.values())
        last = list(curve.values())[-1]
        found.append(
            {
                "instances": instances,
                "replicas": replicas,
                "knee_clients": at,
                "knee_throughput": curve[at].throughput,
                "knee_p50_ms": curve[at].p50_ms,
                "knee_p99_ms": curve[at].p99_ms,
                "peak_throughput": peak,
                "most_clients": last.clients,
                "most_clients_share_of_peak": last.throughput / peak,
                "most_clients_p99_ms": last.p99_ms,
            }
        )
    return found


def write_csv(path: Path, points: Sequence[Point]) -> None:
    """Write a point a line; what holds several numbers is JSON."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [each.name for each in fields(Point)])
        writer.writeheader()
        for point in points:
            writer.writerow(
                {name: json.dumps(value) if isinstance(value, dict) else value for name, value in asdict(point).items()}
            )


def write_json(path: Path, facts: Mapping[str, Any], points: Sequence[Point]) -> None:
    """Write everything; NaN becomes null."""
    document = {**facts, "knee": {"definition": knee.__doc__, "curves": knees(points)}}
    document["points"] = [asdict(point) for point in points]
    path.write_text(json.dumps(_plain(document), indent=1, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return None if np.isnan(value) else round(value, 4)
    return value


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
    """Throughput against clients; p50, p95, p99 and the refused share below; a line for each number of replicas.

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
    """Where the time of a request goes as clients are added, and latency at fixed rates of arrivals."""
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
"""By number of clients: answers/s, and the 99th percentile of their milliseconds."""


def draw_engines(alone: Mapping[str, Curve], served: Mapping[str, Curve], title: str) -> Figure:
    """Throughput and p99 against clients of several engines, by name: asked directly, and through the service."""
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
    """Replicas and instances of the curve that is looked at closely: one replica, as many instances as there were."""
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


_PAGE = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string("""\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>bertqa: load test of {{ facts.date }}</title>
<meta name="viewport" content="width=device-width">
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; margin: 1rem 0 }
td, th { padding: .15rem .6rem; border-bottom: 1px solid #ddd; text-align: right } th { border-color: #888 }
td:first-child, th:first-child { text-align: left }
img { max-width: 100% } dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem } dd { margin: 0 }
.wide { overflow-x: auto } .bad { background: #fdd }
</style></head><body>
<h1>Load test</h1>
<dl>{% for name, value in facts.items() %}<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}</dl>
{% for alt, data in figures.items() %}<p><img alt="{{ alt }}" src="data:image/png;base64,{{ data }}"></p>{% endfor %}
{% for name, rows in tables.items() %}<h2>{{ name }}</h2><div class="wide"><table>
<tr>{% for column in rows[0] %}<th>{{ column }}</th>{% endfor %}</tr>
{% for row in rows %}<tr{% if row.get("wrong") or row.get("error") %} class="bad"{% endif %}>\
{% for cell in row.values() %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>{% endfor %}
<h2>Outcomes</h2><table><tr><th>outcome</th><th>requests</th></tr>
{% for outcome, count in outcomes %}<tr><td>{{ outcome }}</td><td>{{ count }}</td></tr>{% endfor %}</table>
<h2>Words</h2><p>{{ words }}</p>
</body></html>
""")
_WORDS = (
    f"Knee: the fewest clients whose throughput is at least {KNEE:.0%} of the curve's peak. Latency: of right answers, "
    "from the moment when a request was due, which in the closed loop is when it was sent. Right: the very answer that "
    "an undisturbed service gave to one client, and a piece of its text. Shed: 429 or 503 with retry-after. Wrong: a "
    "reply of status 200 that is not right. Error: all else. CPU: for each right answer, of all processes of a role. "
    "Queue and engine are Triton's own account; the service's line is what is left of its infer time, gRPC included."
)
_TABLES: Mapping[str, tuple[Phase, tuple[str, ...]]] = {
    "Closed loop": ("closed", ("replicas", "instances", "clients")),
    "Fixed rate": ("open", ("share", "rate", "late_p99_ms")),
    "Other questions": ("workload", ("mix", "repeat", "clients", "windows")),
    "Scaling with an engine that sleeps": ("scaling", ("replicas", "tritons", "instances", "clients")),
}
_COLUMNS: tuple[str, ...] = (
    "throughput",
    "p50_ms",
    "p95_ms",
    "p99_ms",
    "max_ms",
    "right",
    "shed",
    "wrong",
    "error",
    *STAGES,
)
_COLUMNS += tuple(f"cpu_{role}_ms" for role in ("service", "triton", "haproxy", "clients"))
_COLUMNS += ("memory_service_mib", "memory_triton_mib")


def table(points: Sequence[Point], columns: Sequence[str]) -> list[dict[str, str | int]]:
    """Rows with numbers as people read them; empty where there is none."""
    return [{column: _cell(getattr(point, column)) for column in columns} for point in points]


def _cell(value: Any) -> str | int:
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return value if isinstance(value, int) else str(value)


def markdown(rows: Sequence[Mapping[str, object]]) -> str:
    """A table for the documents."""
    if not rows:
        return ""
    lines = [list(rows[0]), ["---:"] * len(rows[0]), *[list(map(str, row.values())) for row in rows]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_report(directory: Path, facts: Mapping[str, Any], points: Sequence[Point]) -> None:
    """Write points.csv, points.json, throughput.png, latency.png and report.html.

    Args:
        directory: for the files; those that are there are replaced.
        facts: machine, engine, versions, commands; one line each on the page.
        points: in the order of the tables.
    """
    write_csv(directory / "points.csv", points)
    write_json(directory / "points.json", facts, points)
    figures = {}
    if any(point.phase == "closed" for point in points):
        for name, draw in (("throughput", draw_throughput), ("latency", draw_latency)):
            image = io.BytesIO()
            draw(points, str(facts["title"])).savefig(image, format="png", dpi=130)
            (directory / f"{name}.png").write_bytes(image.getvalue())
            figures[f"{name} against clients"] = base64.b64encode(image.getvalue()).decode()
    tables: dict[str, list[dict[str, str | int]]] = {
        "Knees": [{name: _cell(value) for name, value in row.items()} for row in knees(points)]
    }
    for title, (phase, own) in _TABLES.items():
        tables[title] = table([each for each in points if each.phase == phase], own + _COLUMNS)
    outcomes: Counter[str] = Counter()
    for point in points:
        outcomes.update(point.outcomes)
    page = _PAGE.render(
        facts=facts,
        figures=figures,
        tables={title: rows for title, rows in tables.items() if rows},
        outcomes=outcomes.most_common(),
        words=_WORDS,
    )
    (directory / "report.html").write_text(page)
