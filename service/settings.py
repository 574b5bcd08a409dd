"""What varies by deployment, read once from the environment; nothing else in the service reads it."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

PREFIX = "BERTQA_"
_MAY_BE_ZERO = ("max_in_flight", "cache_mb")
_ACCESS = ("open", "key", "off")
_CHOICES = {
    "log_format": ("json", "text"),
    "log_to": ("stderr", "stdout"),
    "log_level": ("debug", "info", "warning", "error"),
    "metrics": _ACCESS,
    "docs": _ACCESS,
    "otlp_protocol": ("grpc", "http/protobuf"),
}
_STANDARD = {"otlp_endpoint": "OTEL_EXPORTER_OTLP_ENDPOINT", "otlp_protocol": "OTEL_EXPORTER_OTLP_PROTOCOL"}
_SWITCH = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
_ORIGIN = re.compile(r"https?://[a-z0-9.-]+(:\d+)?|https?://\[[0-9a-f:]+\](:\d+)?")  # as browsers write them


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of the service; the environment variable of a field is its name in capitals after ``BERTQA_``."""

    triton_url: str = "127.0.0.1:8001"
    """Triton's gRPC address host:port; several, separated by commas, are replicas of one model."""

    triton_tls_ca: str = ""
    """File with the certificates (PEM) that Triton's is checked against; empty: no TLS."""

    triton_tls_cert: str = ""
    """File with our own certificate, for a Triton that wants one (mutual TLS)."""

    triton_tls_key: str = ""
    """File with its key."""

    repository: Path = Path("model_repository")
    """Triton's model repository, or a copy of it: manifests and tokenizers are read from there."""

    model: str = ""
    """Model that answers where a request names none; empty: ``bert_qa``, or the only one that there is."""

    deadline_s: float = 10.0
    """Seconds from a parsed request to its answer, after which it fails; a request may ask for less."""

    api_keys_file: str = ""
    """File with the hashes of the API keys of those who may ask; empty: everyone may."""

    metrics: str = "open"
    """Who may read ``/metrics``: ``open`` to all, with a ``key``, or nobody: ``off``."""

    docs: str = "open"
    """Who may read ``/openapi.json`` and with it ``/docs``, likewise."""

    cors_origins: str = ""
    """Origins like ``https://example.com``, with commas, whose pages may ask from a browser; empty: only our own."""

    shutdown_delay_s: float = 0.0
    """Seconds from SIGTERM until the port is closed; readiness fails at once, so that load balancers turn away."""

    max_in_flight: int = 0
    """Engine calls of this process and a model at one time; 0: two for each instance of the engine at each address."""

    max_wait_s: float = 2.0
    """Seconds that a request may wait for its first turn at the engine; one that would wait longer is refused."""

    cache_mb: int = 0
    """Megabytes of answers that are kept for the same question again, of each model; 0: none."""

    max_memory_mb: int = 128
    """Megabytes that requests in progress may hold: bodies, windows, logits, replies not yet taken."""

    arrival_s: float = 20.0
    """Seconds that a request may take to arrive, a new connection to send one, and a client to take its reply."""

    max_connections: int = 1_000
    """Connections of this process at one time; what comes beyond closes the one that has been idle longest."""

    max_body_bytes: int = 2 * 1024 * 1024
    """Bytes of a request body, counted before anything is parsed."""

    max_question_chars: int = 1_000
    """Characters of a question."""

    max_context_chars: int = 200_000
    """Characters of the contexts of one question together."""

    max_contexts: int = 64
    """Contexts of one question."""

    max_questions: int = 64
    """Questions of one call to ``/v1/answers``."""

    log_format: str = "text"
    """``json``: one object a line; ``text``: for eyes."""

    log_to: str = "stderr"
    """Where the log goes: ``stderr`` or ``stdout``."""

    log_level: str = "info"
    """What is less is not logged: debug, info, warning, error."""

    access_log: bool = True
    """Log a line for each request; probes and scrapes that succeed get none."""

    log_texts: bool = False
    """Let the log hold questions, contexts and the messages of exceptions, which may quote them."""

    otlp_endpoint: str = ""
    """URL of an OpenTelemetry collector, which gets traces; empty: nobody does. The variable is the standard's own."""

    otlp_protocol: str = "grpc"
    """``grpc`` or ``http/protobuf``; likewise."""

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            ValueError: the message begins with the name of the environment variable.
        """
        if not all(part.strip() for part in self.triton_url.split(",")):
            raise ValueError(f"{PREFIX}TRITON_URL: must be host:port, or several with commas; got {self.triton_url!r}")
        if bool(self.triton_tls_cert) != bool(self.triton_tls_key):
            raise ValueError(f"{PREFIX}TRITON_TLS_CERT, {PREFIX}TRITON_TLS_KEY: one needs the other")
        if self.triton_tls_cert and not self.triton_tls_ca:
            raise ValueError(f"{PREFIX}TRITON_TLS_CERT: needs {PREFIX}TRITON_TLS_CA")
        if not 0 < self.deadline_s <= 3600:
            raise ValueError(f"{PREFIX}DEADLINE_S: must be above 0 and at most 3600 seconds; got {self.deadline_s}")
        if not 0 < self.max_wait_s <= 3600:
            raise ValueError(f"{PREFIX}MAX_WAIT_S: must be above 0 and at most 3600 seconds; got {self.max_wait_s}")
        if not 0 < self.arrival_s <= 3600:
            raise ValueError(f"{PREFIX}ARRIVAL_S: must be above 0 and at most 3600 seconds; got {self.arrival_s}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                given = getattr(self, name)
                raise ValueError(f"{_variable(name)}: must be one of {', '.join(choices)}; got {given!r}")
        for name in ("metrics", "docs"):
            if getattr(self, name) == "key" and not self.api_keys_file:
                raise ValueError(f"{_variable(name)}: key needs {PREFIX}API_KEYS_FILE")
        for origin in self.allowed_origins:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"{PREFIX}CORS_ORIGINS: must be origins like https://example.com, with commas; got {origin!r}"
                )
        if not 0 <= self.shutdown_delay_s <= 300:
            raise ValueError(f"{PREFIX}SHUTDOWN_DELAY_S: must be from 0 to 300 seconds; got {self.shutdown_delay_s}")
        for field in fields(self):
            least = 0 if field.name in _MAY_BE_ZERO else 1
            if field.type is int and getattr(self, field.name) < least:
                raise ValueError(f"{_variable(field.name)}: must be at least {least}; got {getattr(self, field.name)}")

    @property
    def triton_urls(self) -> tuple[str, ...]:
        """The addresses one by one."""
        return tuple(part.strip() for part in self.triton_url.split(","))

    @property
    def allowed_origins(self) -> tuple[str, ...]:
        """The origins one by one."""
        return tuple(part.strip() for part in self.cors_origins.split(",") if part.strip())

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> "Settings":
        """Read the variables that are set and not empty; the others keep their defaults.

        Raises:
            ValueError: a value is not of its type or out of range; the message begins with the variable's name.
        """
        values: dict[str, Any] = {}
        for field in fields(cls):
            text = environ.get(_variable(field.name), "").strip()
            if text:
                convert: Callable[[str], Any] = field.type  # type: ignore[assignment]  # a class: no deferred annotations
                try:
                    values[field.name] = _SWITCH[text.lower()] if field.type is bool else convert(text)
                except (ValueError, KeyError):
                    kind = {int: "a whole number", float: "a number", bool: "true or false"}[field.type]  # type: ignore[index]
                    raise ValueError(f"{_variable(field.name)}: must be {kind}; got {text!r}") from None
        return cls(**values)


def _variable(name: str) -> str:
    return _STANDARD.get(name, PREFIX + name.upper())
