"""What ``GET /metrics`` tells Prometheus.

Counts are per process. Run one process per port and let Prometheus scrape each: merging several processes behind one
port needs files shared between them, which costs more on the hot path than it tells.
"""

import platform
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client import Info as InfoMetric

from bertqa.manifest import Bundle
from service.circuit import State

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
WINDOWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """The metrics of one application, in a registry of its own, so that several can live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.in_flight = Gauge("bertqa_requests_in_flight", "HTTP requests in progress", registry=self.registry)
        self.tasks = Gauge(
            "bertqa_asyncio_tasks", "Tasks of the event loop; grows without end where one leaks", registry=self.registry
        )
        self._requests = Counter(
            "bertqa_requests", "HTTP requests by route and status", ["route", "status"], registry=self.registry
        )
        self._errors = Counter(
            "bertqa_errors", "Requests not answered, by error_type", ["error_type"], registry=self.registry
        )
        self._keys = Counter(
            "bertqa_key_requests",
            "Requests by API key: accepted, or limited by its rate",
            ["key", "outcome"],
            registry=self.registry,
        )
        self._truncations = Counter(
            "bertqa_question_truncations", "Questions cut to the model's limit of tokens", registry=self.registry
        )
        self._questions = Counter(
            "bertqa_questions", "Questions answered, probes included", ["model", "version"], registry=self.registry
        )
        self._models = Gauge(
            "bertqa_model_info", "What answers now", ["model", "version", "identity"], registry=self.registry
        )
        circuit = ["replica", "model", "version"]
        self._circuits = Gauge(
            "bertqa_circuit_state", "Of each Triton: 0 closed, 1 half-open, 2 open", circuit, registry=self.registry
        )
        self._transitions = Counter(
            "bertqa_circuit_transitions", "Changes of a circuit's state", [*circuit, "to"], registry=self.registry
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
        lost_records = Counter(
            "bertqa_log_records_lost", "Log records that could not be written", registry=self.registry
        )
        self.lost_records = lost_records.inc
        self._build = InfoMetric("bertqa_build", "What runs here", registry=self.registry)

    def built(self, **labels: str) -> None:
        """Tell versions, as labels."""
        self._build.info({**labels, "python": platform.python_version()})

    def serves(self, bundles: Iterable[Bundle]) -> None:
        """Tell which version of each model answers from now on."""
        self._models.clear()
        served = set()
        for bundle in bundles:
            self._models.labels(bundle.model, str(bundle.version), bundle.manifest.identity).set(1)
            served.add((bundle.model, str(bundle.version)))
        for labels in [sample.labels for metric in self._circuits.collect() for sample in metric.samples]:
            if (labels["model"], labels["version"]) not in served:
                self._circuits.remove(*labels.values())

    def circuit(self, replica: str, model: str, version: str) -> Callable[[State], None]:
        """What is told the states of a circuit that begins now, closed."""
        labels = replica, model, version
        self._circuits.labels(*labels).set(State.CLOSED)

        def change(state: State) -> None:
            self._circuits.labels(*labels).set(state)
            self._transitions.labels(*labels, state.name.lower()).inc()

        return change

    def questions(self, model: str, version: int) -> Callable[[], None]:
        """What counts a question that this version answered."""
        return self._questions.labels(model, str(version)).inc

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
        self._requests.labels(route, status).inc()
        if error_type is not None:
            self._errors.labels(error_type).inc()
        if seconds is not None:
            self._total.observe(seconds)

    def admitted(self, key: str, accepted: bool) -> None:
        """Count a request that came with a key."""
        self._keys.labels(key, "accepted" if accepted else "limited").inc()

    def text(self) -> bytes:
        """The exposition format, as `prometheus_client.CONTENT_TYPE_LATEST`."""
        return generate_latest(self.registry)
