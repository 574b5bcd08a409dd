"""The Prometheus metrics of ``GET /metrics``.

If several processes share a port (``--workers``), a scrape reaches one of them but must cover all. So they count in
files, in the directory of prometheus_client's variable ``PROMETHEUS_MULTIPROC_DIR``, which must be empty at the start.
Labels in these files cannot be removed: a version that is no longer active stays with value 0.
"""

import os
import platform
from collections.abc import Callable, Iterable, Iterator
from enum import IntEnum
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, ProcessCollector, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from bertqa.manifest import Bundle

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
LAG_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
WINDOWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """The metrics of one application, in its own registry, so that a process may have several."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        shared = os.environ.get("PROMETHEUS_MULTIPROC_DIR")  # not our setting: prometheus_client reads it on import
        self._shared = Path(shared) if shared else None
        if not self._shared:
            ProcessCollector(registry=self.registry)
        self._define_process()
        self._define_requests()
        self._define_models()
        self._define_questions()
        self._define_cache()

    def _define_process(self) -> None:
        self.in_flight = Gauge(
            "bertqa_requests_in_flight",
            "HTTP requests in progress",
            registry=self.registry,
            multiprocess_mode="livesum",
        )
        self.tasks = Gauge(
            "bertqa_asyncio_tasks",
            "Tasks of the event loop; keeps growing if tasks leak",
            registry=self.registry,
            multiprocess_mode="livesum",
        )
        self.loop_lag = Histogram(
            "bertqa_event_loop_lag_seconds",
            "Delay of the event loop's wake-up, measured twice a second",
            buckets=LAG_SECONDS,
            registry=self.registry,
        )
        self.connections = Gauge(
            "bertqa_connections", "Open connections of clients", registry=self.registry, multiprocess_mode="livesum"
        )
        self.queue_wait = Gauge(
            "bertqa_queue_wait_seconds",
            "Time that a new question would wait for its first engine call, measured twice a second",
            registry=self.registry,
            multiprocess_mode="livemax",
        )
        lost_records = Counter(
            "bertqa_log_records_lost", "Log records that could not be written", registry=self.registry
        )
        self.lost_records = lost_records.inc
        self._build = Gauge(
            "bertqa_build_info",
            "Versions of the service and of Python",
            ["version", "python"],
            registry=self.registry,
            multiprocess_mode="livemax",
        )

    def _define_requests(self) -> None:
        self._requests = Counter(
            "bertqa_requests", "HTTP requests by route and status", ["route", "status"], registry=self.registry
        )
        self._replies: dict[tuple[str, int], Counter] = {}  # children by their labels: `labels` costs more than `inc`
        self._errors = Counter("bertqa_errors", "Failed requests by error_type", ["error_type"], registry=self.registry)
        self._keys = Counter(
            "bertqa_key_requests",
            "Requests by API key: accepted, or rejected by its rate limit",
            ["key", "outcome"],
            registry=self.registry,
        )

    def _define_models(self) -> None:
        self._models = Gauge(
            "bertqa_model_info",
            "Active version of each model",
            ["model", "version", "identity"],
            registry=self.registry,
            multiprocess_mode="livemax",
        )
        circuit = ["replica", "model", "version"]
        self._circuits = Gauge(
            "bertqa_circuit_state",
            "State of the circuit breaker of each Triton: 0 closed, 1 half-open, 2 open",
            circuit,
            registry=self.registry,
            multiprocess_mode="livemax",
        )
        self._transitions = Counter(
            "bertqa_circuit_transitions", "State changes of circuit breakers", [*circuit, "to"], registry=self.registry
        )

    def _define_questions(self) -> None:
        self._truncations = Counter(
            "bertqa_question_truncations", "Questions cut to the model's token limit", registry=self.registry
        )
        self._questions = Counter(
            "bertqa_questions", "Answered questions, including probes", ["model", "version"], registry=self.registry
        )
        self._windows = Histogram(
            "bertqa_windows", "Windows per question; each is one engine call", buckets=WINDOWS, registry=self.registry
        )
        seconds = Histogram(
            "bertqa_seconds",
            "Latency by stage: tokenize, infer (queue and computation) and decode per question, total per request",
            ["stage"],
            buckets=SECONDS,
            registry=self.registry,
        )
        # Look up children once, because a lookup by label costs more than an observation.
        self._tokenize, self._infer, self._decode, self._total = (
            seconds.labels(stage) for stage in ("tokenize", "infer", "decode", "total")
        )

    def _define_cache(self) -> None:
        self._lookups = Counter(
            "bertqa_cache_lookups",
            "Questions by where their answers came from: hit, coalesced with one in progress, or miss",
            ["source"],
            registry=self.registry,
        )
        for source in ("hit", "coalesced", "miss"):
            self._lookups.labels(source)  # exists from the start, so that Prometheus sees its first increase
        self._cache_entries = Gauge(
            "bertqa_cache_entries", "Cached answers", registry=self.registry, multiprocess_mode="livesum"
        )
        self._cache_bytes = Gauge(
            "bertqa_cache_bytes", "Bytes of cached answers", registry=self.registry, multiprocess_mode="livesum"
        )

    def built(self, version: str) -> None:
        """Set the versions, as labels."""
        self._build.labels(version, platform.python_version()).set(1)

    def serves(self, bundles: Iterable[Bundle]) -> None:
        """Set the active version of each model."""
        served = set()
        for bundle in bundles:
            self._models.labels(bundle.model, str(bundle.version), bundle.manifest.identity).set(1)
            served.add((bundle.model, str(bundle.version)))
        for gauge in (self._models, self._circuits):
            for labels in [sample.labels for metric in gauge.collect() for sample in metric.samples]:
                if (labels["model"], labels["version"]) in served:
                    continue
                if self._shared:
                    gauge.labels(**labels).set(0)
                else:
                    gauge.remove(*labels.values())

    def circuit(self, replica: str, model: str, version: str) -> Callable[[IntEnum], None]:
        """Add a closed circuit breaker; returns a function to call with each later `circuit_breaker.State`."""
        labels = replica, model, version
        self._circuits.labels(*labels).set(0)

        def change(state: IntEnum) -> None:
            self._circuits.labels(*labels).set(state)
            self._transitions.labels(*labels, state.name.lower()).inc()

        return change

    def questions(self, model: str, version: int) -> Callable[[], None]:
        """Return a function that counts an answered question of a version."""
        return self._questions.labels(model, str(version)).inc

    def looked_up(self, source: str, *, entries: int, held_bytes: int) -> None:
        """Count a question by the source of its answer, and set the size of the caches."""
        self._lookups.labels(source).inc()
        self._cache_entries.set(entries)
        self._cache_bytes.set(held_bytes)

    def tokenized(self, seconds: float, windows: int, truncated: bool) -> None:
        """Count a tokenized question."""
        self._tokenize.observe(seconds)
        self._windows.observe(windows)
        if truncated:
            self._truncations.inc()

    def answered(self, infer_s: float, decode_s: float) -> None:
        """Count an answered question."""
        self._infer.observe(infer_s)
        self._decode.observe(decode_s)

    def requested(self, route: str, status: int, error_type: str | None, seconds: float | None) -> None:
        """Count an HTTP request; ``seconds`` only for requests that use the engine."""
        counted = self._replies.get((route, status))
        if counted is None:
            counted = self._replies[route, status] = self._requests.labels(route, status)
        counted.inc()
        if error_type is not None:
            self._errors.labels(error_type).inc()
        if seconds is not None:
            self._total.observe(seconds)

    def admitted(self, key: str, accepted: bool) -> None:
        """Count a request with an API key."""
        self._keys.labels(key, "accepted" if accepted else "limited").inc()

    def text(self) -> bytes:
        """Return the metrics in the exposition format `prometheus_client.CONTENT_TYPE_LATEST`."""
        if not self._shared:
            return generate_latest(self.registry)
        merged = CollectorRegistry()
        merged.register(_Workers(self._shared))
        MultiProcessCollector(merged, str(self._shared))  # type: ignore[no-untyped-call]
        return generate_latest(merged)


class _Workers(Collector):
    """Adds up the standard ``process_`` metrics of all processes that share a directory, without dead ones."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def collect(self) -> Iterator[Metric]:
        totals: dict[str, Metric] = {}
        for path in self._directory.glob("gauge_livesum_*.db"):
            pid = int(path.stem.rpartition("_")[2])
            if not Path(f"/proc/{pid}").exists():
                mark_process_dead(pid, str(self._directory))  # type: ignore[no-untyped-call]
                continue
            for metric in ProcessCollector(pid=lambda pid=pid: pid, registry=None).collect():  # type: ignore[misc]
                total = totals.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
                total.samples = [_added(sample, total.samples) for sample in metric.samples]
        yield from totals.values()


def _added(sample: Sample, before: list[Sample]) -> Sample:
    """Combine a sample with an earlier one: the minimum of start times, the sum of the rest."""
    both = [sample.value, *(each.value for each in before)]
    return sample._replace(value=min(both) if sample.name == "process_start_time_seconds" else sum(both))
