"""What ``GET /metrics`` tells Prometheus.

Where several processes share a port (``--workers``), each scrape reaches one of them and tells of all: they count in
files in the directory that prometheus_client's own variable ``PROMETHEUS_MULTIPROC_DIR`` names, which must be empty at
the start. What these files cannot do is forget: a version that answers no longer stays, with value 0.
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
    """The metrics of one application, in a registry of its own, so that several can live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        shared = os.environ.get("PROMETHEUS_MULTIPROC_DIR")  # not ours: prometheus_client read it when imported
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
            "Tasks of the event loop; grows without end where one leaks",
            registry=self.registry,
            multiprocess_mode="livesum",
        )
        self.loop_lag = Histogram(
            "bertqa_event_loop_lag_seconds",
            "How much later than it should the event loop woke, twice a second",
            buckets=LAG_SECONDS,
            registry=self.registry,
        )
        self.connections = Gauge(
            "bertqa_connections", "Open connections of clients", registry=self.registry, multiprocess_mode="livesum"
        )
        self.queue_wait = Gauge(
            "bertqa_queue_wait_seconds",
            "How long a question that came now would wait for its first engine call, looked at twice a second",
            registry=self.registry,
            multiprocess_mode="livemax",
        )
        lost_records = Counter(
            "bertqa_log_records_lost", "Log records that could not be written", registry=self.registry
        )
        self.lost_records = lost_records.inc
        self._build = Gauge(
            "bertqa_build_info",
            "What runs here",
            ["version", "python"],
            registry=self.registry,
            multiprocess_mode="livemax",
        )

    def _define_requests(self) -> None:
        self._requests = Counter(
            "bertqa_requests", "HTTP requests by route and status", ["route", "status"], registry=self.registry
        )
        self._replies: dict[tuple[str, int], Counter] = {}  # children by their labels: `labels` costs more than `inc`
        self._errors = Counter(
            "bertqa_errors", "Requests not answered, by error_type", ["error_type"], registry=self.registry
        )
        self._keys = Counter(
            "bertqa_key_requests",
            "Requests by API key: accepted, or limited by its rate",
            ["key", "outcome"],
            registry=self.registry,
        )

    def _define_models(self) -> None:
        self._models = Gauge(
            "bertqa_model_info",
            "What answers now",
            ["model", "version", "identity"],
            registry=self.registry,
            multiprocess_mode="livemax",
        )
        circuit = ["replica", "model", "version"]
        self._circuits = Gauge(
            "bertqa_circuit_state",
            "Of each Triton: 0 closed, 1 half-open, 2 open",
            circuit,
            registry=self.registry,
            multiprocess_mode="livemax",
        )
        self._transitions = Counter(
            "bertqa_circuit_transitions", "Changes of a circuit's state", [*circuit, "to"], registry=self.registry
        )

    def _define_questions(self) -> None:
        self._truncations = Counter(
            "bertqa_question_truncations", "Questions cut to the model's limit of tokens", registry=self.registry
        )
        self._questions = Counter(
            "bertqa_questions", "Questions answered, probes included", ["model", "version"], registry=self.registry
        )
        self._windows = Histogram(
            "bertqa_windows", "Windows of a question, each one engine call", buckets=WINDOWS, registry=self.registry
        )
        seconds = Histogram(
            "bertqa_seconds",
            "Latency by stage: tokenize, infer (queue and computation) and decode of a question, total of a request",
            ["stage"],
            buckets=SECONDS,
            registry=self.registry,
        )
        # Children are looked up once: a lookup by label costs more than the observation.
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
            self._lookups.labels(source)  # there from the start, so that its first increase is seen
        self._cache_entries = Gauge(
            "bertqa_cache_entries", "Answers kept", registry=self.registry, multiprocess_mode="livesum"
        )
        self._cache_bytes = Gauge(
            "bertqa_cache_bytes", "Bytes of the answers kept", registry=self.registry, multiprocess_mode="livesum"
        )

    def built(self, version: str) -> None:
        """Tell versions, as labels."""
        self._build.labels(version, platform.python_version()).set(1)

    def serves(self, bundles: Iterable[Bundle]) -> None:
        """Tell which version of each model answers from now on."""
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
        """Add a circuit that begins closed; returns what to call with each later `circuit_breaker.State`."""
        labels = replica, model, version
        self._circuits.labels(*labels).set(0)

        def change(state: IntEnum) -> None:
            self._circuits.labels(*labels).set(state)
            self._transitions.labels(*labels, state.name.lower()).inc()

        return change

    def questions(self, model: str, version: int) -> Callable[[], None]:
        """What counts a question that this version answered."""
        return self._questions.labels(model, str(version)).inc

    def looked_up(self, source: str, *, entries: int, held_bytes: int) -> None:
        """Count a question by where its answer came from, and set what the caches hold now."""
        self._lookups.labels(source).inc()
        self._cache_entries.set(entries)
        self._cache_bytes.set(held_bytes)

    def tokenized(self, seconds: float, windows: int, truncated: bool) -> None:
        """Count a question that became windows."""
        self._tokenize.observe(seconds)
        self._windows.observe(windows)
        if truncated:
            self._truncations.inc()

    def answered(self, infer_s: float, decode_s: float) -> None:
        """Count a question that the engine answered."""
        self._infer.observe(infer_s)
        self._decode.observe(decode_s)

    def requested(self, route: str, status: int, error_type: str | None, seconds: float | None) -> None:
        """Count an HTTP request; its seconds only where it is one that asks the engine."""
        counted = self._replies.get((route, status))
        if counted is None:
            counted = self._replies[route, status] = self._requests.labels(route, status)
        counted.inc()
        if error_type is not None:
            self._errors.labels(error_type).inc()
        if seconds is not None:
            self._total.observe(seconds)

    def admitted(self, key: str, accepted: bool) -> None:
        """Count a request that came with a key."""
        self._keys.labels(key, "accepted" if accepted else "limited").inc()

    def text(self) -> bytes:
        """The exposition format, as `prometheus_client.CONTENT_TYPE_LATEST`."""
        if not self._shared:
            return generate_latest(self.registry)
        merged = CollectorRegistry()
        merged.register(_Workers(self._shared))
        MultiProcessCollector(merged, str(self._shared))  # type: ignore[no-untyped-call]
        return generate_latest(merged)


class _Workers(Collector):
    """The standard ``process_`` metrics of all processes that count in a directory, added up; forgets dead ones."""

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
    """A sample with the one before: the earliest start, and of everything else the sum."""
    both = [sample.value, *(each.value for each in before)]
    return sample._replace(value=min(both) if sample.name == "process_start_time_seconds" else sum(both))
