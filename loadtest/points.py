"""What a load test measured: samples become points, and points become curves with a knee."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import numpy as np

from loadtest.replies import ERROR, RIGHT, SHED, WRONG, Sample

KNEE = 0.95
"""The knee of a curve is its smallest number of clients at which throughput is at least this share of its peak."""
SLICES = 4
"""Parts of a measurement; the lowest and highest throughput of a part show how steady it was."""
_FEWEST = {50: 1, 95: 20, 99: 100}
"""Fewest replies for each percentile; with fewer it is NaN."""

Phase = Literal["closed", "open", "workload", "scaling"]
STAGES = ("http_ms", "tokenize_ms", "line_ms", "queue_ms", "compute_ms", "decode_ms")


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A load on a set of servers; equal loads are the same measurement."""

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
    """A load and its results. Times are in milliseconds; unknown values are NaN."""

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
        """The load without the results."""
        return Load(**{each.name: getattr(self, each.name) for each in fields(Load)})


def read_samples(result: Mapping[str, Any]) -> list[Sample]:
    """Read the samples of a result file of the locustfile."""
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
        **_stages(right, engine),
        **_costs(len(right), cpu_s, memory_mib),
        outcomes=dict(sorted(outcomes.items())),
        kinds={
            kind: {"requests": len(of_kind), **percentiles(of_kind)}
            for kind in sorted({each.kind for each in due})
            for of_kind in [[each for each in due if each.kind == kind]]
        },
    )


def _stages(right: Sequence[Sample], engine: Mapping[str, float]) -> dict[str, Any]:
    """Means of the windows of a request and of the milliseconds in each stage; arguments as in `summarize`."""
    windows = mean([each.windows for each in right])
    tokenize, infer, decode, total = (
        mean([getattr(each, f"{stage}_ms") for each in right]) for stage in ("tokenize", "infer", "decode", "total")
    )
    calls = engine.get("calls") or float("nan")
    queue, compute = (1e3 * engine.get(f"{part}_s", float("nan")) / calls for part in ("queue", "compute"))
    return {
        "windows": windows,
        "http_ms": mean([1e3 * (each.ended - each.due) for each in right]) - total,
        "tokenize_ms": tokenize,
        # Triton computes several windows of a request at once, so the times of one do not add up to the request's.
        "line_ms": infer - queue - compute if windows < 1.1 else float("nan"),
        "queue_ms": queue,
        "compute_ms": compute,
        "decode_ms": decode,
    }


def _costs(right: int, cpu_s: Mapping[str, float], memory_mib: Mapping[str, float]) -> dict[str, Any]:
    """CPU milliseconds of each right answer and MiB of memory, by role; arguments as in `summarize`."""
    roles = ("service", "triton", "haproxy", "clients")
    cpu = {f"cpu_{role}_ms": 1e3 * cpu_s.get(role, 0.0) / right if right else float("nan") for role in roles}
    return cpu | {f"memory_{role}_mib": memory_mib.get(role, float("nan")) for role in ("service", "triton")}


def percentiles(samples: Sequence[Sample]) -> dict[str, float]:
    """Latencies from the moment when requests were due, in milliseconds."""
    latencies = [1e3 * (each.ended - each.due) for each in samples]
    return {f"p{percent}_ms": percentile(latencies, percent) for percent in _FEWEST} | {
        "max_ms": max(latencies, default=float("nan"))
    }


def percentile(values: Sequence[float], percent: int) -> float:
    """A percentile; NaN if there are too few values."""
    return float(np.percentile(values, percent)) if len(values) >= _FEWEST[percent] else float("nan")


def mean(values: Sequence[float]) -> float:
    """The mean; NaN without values."""
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
    """Select the points of one curve, by rising number of clients; ``wanted`` are fields of `Load`."""
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
