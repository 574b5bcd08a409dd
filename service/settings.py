"""The settings of the service, read once from the environment; no other module reads it.

Each setting is a field of `Settings` with its type, range, default and meaning. The table in
docs/operations.md is printed by ``python -m service.settings``.
"""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le
from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

PREFIX = "BERTQA_"
OTHERS = frozenset(
    PREFIX + name
    for name in (
        *("API_KEY", "URL", "QUESTIONS"),  # of clients
        *("ADDRESS", "PORT", "MODELS", "DATA", "CHECKPOINTS"),  # of docker-compose.yml
        *("TRITON_CPUS", "TRITON_MEMORY", "BUILDER_MEMORY", "BATCH_MEMORY"),
        "VENV",  # of deploy/slurm/train.sbatch
    )
)
"""Variables with our prefix that other programs read."""

# Kubernetes and Docker set these in every container next to a service named bertqa.
_SERVICE_LINK = re.compile(PREFIX + r"(\w+_)?(SERVICE_(HOST|PORT)(_\w+)?|PORT(_\d+_(TCP|UDP)(_(PROTO|PORT|ADDR))?)?)")
_ORIGIN = re.compile(r"https?://[a-z0-9.-]+(:\d+)?|https?://\[[0-9a-f:]+\](:\d+)?")  # as browsers write them

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Access = Literal["open", "key", "off"]


class SettingsError(ValueError):
    """A setting is invalid; the message begins with the name of its variable."""


class Settings(BaseSettings):
    """Settings of the service; the environment variable of a field is ``BERTQA_`` and its name in capitals."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="forbid", validate_by_name=True, use_attribute_docstrings=True
    )

    triton_url: str = "127.0.0.1:8001"
    """gRPC address of Triton, host:port; several addresses, separated by commas, are replicas. `bertqa serve` sets
    it."""

    triton_tls_ca: str = ""
    """PEM file with the CA certificates for Triton's certificate. Empty: no TLS."""

    triton_tls_cert: str = ""
    """PEM file with the service's own certificate, if Triton requires one (mutual TLS)."""

    triton_tls_key: str = ""
    """PEM file with the private key of that certificate."""

    repository: Path = Path("model_repository")
    """Triton's model repository or a copy of it, with manifests and tokenizers. `bertqa serve` sets it."""

    model: str = ""
    """Model for requests that name none. Empty: `bert_qa`, or the only model."""

    deadline_s: float = Field(default=10.0, gt=0, le=3600)
    """Timeout in seconds from a parsed request to its answer; a request may ask for less."""

    api_keys_file: str = ""
    """File with the hashes of the API keys. Empty: no keys are required."""

    metrics: Access = "open"
    """Who may read `/metrics`: everyone (`open`), clients with a key (`key`), or nobody (`off`)."""

    docs: Access = "open"
    """Who may read `/openapi.json`, which `/docs` needs; values as for `/metrics`."""

    cors_origins: str = ""
    """Origins such as `https://example.com`, separated by commas, whose pages may call the service (CORS). Empty: only
    the service's own page."""

    shutdown_delay_s: float = Field(default=0.0, ge=0, le=300)
    """Seconds from SIGTERM until the port closes; readiness fails at once. Set it to the time that your load balancer
    needs to notice."""

    max_in_flight: CountOrZero = 0
    """Concurrent engine calls of a process for a model. 0: two for each engine instance at each address of Triton."""

    max_wait_s: float = Field(default=2.0, gt=0, le=3600)
    """Seconds that a request may wait for its first turn at the engine; one that would wait longer gets 503."""

    cache_mb: CountOrZero = 0
    """Megabytes of answers that each process caches for each model. 0: no cache."""

    max_memory_mb: Count = 128
    """Megabytes of memory for requests in progress: bodies, windows, logits, unread replies. Requests beyond that get
    503."""

    arrival_s: float = Field(default=20.0, gt=0, le=3600)
    """Seconds for a request to arrive, for a new connection to send one, and for a client to read its reply."""

    max_connections: Count = 1_000
    """Open connections per process; one more closes the connection that has been idle longest."""

    max_body_bytes: Count = 2 * 1024 * 1024
    """Bytes of a request body, checked before parsing."""

    max_question_chars: Count = 1_000
    """Characters of a question."""

    max_context_chars: Count = 200_000
    """Characters in all contexts of a question together."""

    max_contexts: Count = 64
    """Contexts of a question."""

    max_questions: Count = 64
    """Questions of one call to `/v1/answers`."""

    log_format: Literal["json", "text"] = "text"
    """`json`: one object per line, for machines; `text`: for people."""

    log_to: Literal["stderr", "stdout"] = "stderr"
    """Where to write the log."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Lowest level that is logged."""

    access_log: bool = True
    """Log a line for each request, except successful probes and scrapes."""

    log_texts: bool = False
    """Allow questions, contexts and exception messages, which may quote them, in the log."""

    otlp_endpoint: str = Field(default="", validation_alias="OTEL_EXPORTER_OTLP_ENDPOINT")
    """URL of the OpenTelemetry collector for traces. Empty: no traces."""

    otlp_protocol: Literal["grpc", "http/protobuf"] = Field(
        default="grpc", validation_alias="OTEL_EXPORTER_OTLP_PROTOCOL"
    )
    """OTLP protocol of that collector."""

    if not TYPE_CHECKING:  # a type checker sees the fields as parameters

        def __init__(self, **values: Any) -> None:
            """Check the values.

            Raises:
                SettingsError: a value has the wrong type, is out of range, or conflicts with another.
            """
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise SettingsError(_in_one_line(error)) from None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Use only the given values; `from_environment` alone reads variables."""
        return (init_settings,)

    @field_validator("triton_url")
    @classmethod
    def _addresses(cls, text: str) -> str:
        if not all(part.strip() for part in text.split(",")):
            raise ValueError("must be host:port, or several separated by commas")
        return text

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, text: str) -> str:
        if bad := [part for part in _parts(text) if not _ORIGIN.fullmatch(part)]:
            raise ValueError(
                f"must be origins such as https://example.com, separated by commas; {bad[0]!r} is not an origin"
            )
        return text

    @model_validator(mode="after")
    def _together(self) -> "Settings":
        if bool(self.triton_tls_cert) != bool(self.triton_tls_key):
            raise ValueError(f"{PREFIX}TRITON_TLS_CERT, {PREFIX}TRITON_TLS_KEY: set both or neither")
        if self.triton_tls_cert and not self.triton_tls_ca:
            raise ValueError(f"{PREFIX}TRITON_TLS_CERT: needs {PREFIX}TRITON_TLS_CA")
        for name in ("metrics", "docs"):
            if getattr(self, name) == "key" and not self.api_keys_file:
                raise ValueError(f"{variable(name)}: key needs {PREFIX}API_KEYS_FILE")
        return self

    @property
    def triton_urls(self) -> tuple[str, ...]:
        """The addresses of Triton as a tuple."""
        return _parts(self.triton_url)

    @property
    def allowed_origins(self) -> tuple[str, ...]:
        """The allowed origins as a tuple."""
        return _parts(self.cors_origins)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> "Settings":
        """Read the variables that are set and not empty; other settings keep their defaults.

        Raises:
            SettingsError: a variable that begins with ``BERTQA_`` is not a setting, or a value is invalid.
        """
        known = [variable(name) for name in cls.model_fields]
        for name in environ:
            if name.startswith(PREFIX) and name not in OTHERS.union(known) and not _SERVICE_LINK.fullmatch(name):
                # Compare without the common prefix, which would make all names similar.
                near = difflib.get_close_matches(
                    name.removeprefix(PREFIX), [each.removeprefix(PREFIX) for each in known], 1
                )
                hint = f"did you mean {PREFIX}{near[0]}?" if near else "docs/operations.md lists the settings"
                raise SettingsError(f"{name}: no such setting; {hint}")
        source = EnvSettingsSource(cls, case_sensitive=False)
        source.env_vars = {name.lower(): text for name in known if (text := environ.get(name, "").strip())}
        return cls(**source())


def variable(name: str) -> str:
    """Return the environment variable of a field."""
    alias = Settings.model_fields[name].validation_alias
    return alias if isinstance(alias, str) else PREFIX + name.upper()


def markdown_table() -> str:
    """Return the settings as a Markdown table: variable, default, allowed values, meaning."""
    lines = ["| variable | default | may be | meaning |", "|---|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = f"{field.default}".removesuffix(".0") or "none"
        default = default.lower() if isinstance(field.default, bool) else default
        meaning = " ".join((field.description or "").split())
        lines.append(f"| `{variable(name)}` | {default} | {allowed(field)} | {meaning} |")
    return "\n".join(lines) + "\n"


def allowed(field: FieldInfo) -> str:
    """Describe the allowed values of a field."""
    if get_origin(field.annotation) is Literal:
        return "one of " + ", ".join(get_args(field.annotation))
    kinds: dict[object, str] = {bool: "true or false", int: "a whole number", float: "a number", Path: "a path"}
    kind, limits = kinds.get(field.annotation, "text"), []
    for limit in field.metadata:
        match limit:
            case Gt(gt=number):
                limits.append(f"above {number}")
            case Ge(ge=number):
                limits.append(f"at least {number}")
            case Le(le=number):
                limits.append(f"at most {number}")
    return f"{kind}, {' and '.join(limits)}" if limits else kind


def _parts(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _in_one_line(error: ValidationError) -> str:
    """Return the first error as ``VARIABLE: what it must be; got the value``."""
    found = error.errors()[0]
    if not found["loc"]:  # an error about several fields, with our own message
        return str(found["ctx"]["error"])
    fields = {**Settings.model_fields, **{variable(name): field for name, field in Settings.model_fields.items()}}
    name = str(found["loc"][0])
    if name not in fields:
        return f"{name}: no such setting"
    problem = str(found["ctx"]["error"]) if found["type"] == "value_error" else f"must be {allowed(fields[name])}"
    return f"{name if name.isupper() else variable(name)}: {problem}; got {found['input']!r:.80}"


if __name__ == "__main__":
    print(markdown_table(), end="")
