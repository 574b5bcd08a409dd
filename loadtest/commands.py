"""Command lines of the load tests; they need Typer alone, and import a measurement when it runs.

``bertqa loadtest`` is the sweep. The others are ``python -m loadtest.measure_service``, ``loadtest.measure_admission``,
``loadtest.compare_servers`` and ``loadtest.sleeping_engine``.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import typer

from bertqa.cli.command import CommandError, Exit, at_least_one, command, group, not_negative, positive

PROJECT = Path(__file__).resolve().parent.parent
CHECKPOINT = PROJECT / "checkpoints" / "minilm-l6-squad"
PHASES = ("closed", "open", "workload", "scaling")

app = group("Measure throughput against clients, replicas and engines.", no_args_is_help=False)
service_app = group("Measure what the service adds to its engine.", no_args_is_help=False)
admission_app = group("Measure whether admission serves people.", no_args_is_help=False)
compare_app = group("Compare the service with other servers.", no_args_is_help=False)
sleeping_app = group("Write a model repository with an engine that sleeps.")

_Checkpoint = Annotated[
    Path, typer.Option(metavar="DIR", show_default="that of the project", help="Checkpoint of the model.")
]


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """Options of ``bertqa loadtest``; those that are lists may be given several times."""

    clients: Annotated[
        list[int], typer.Option(metavar="N", show_default="1, 2, 4 … 256", help="Number of clients; may be repeated.")
    ] = field(default_factory=lambda: [2**n for n in range(9)])
    replicas: Annotated[
        list[int], typer.Option(metavar="N", show_default="1, 2, 4", help="Replicas of the service; may be repeated.")
    ] = field(default_factory=lambda: [1, 2, 4])
    instances: Annotated[
        list[int], typer.Option(metavar="N", show_default="1, 2", help="Engines in Triton; may be repeated.")
    ] = field(default_factory=lambda: [1, 2])
    seconds: Annotated[float, typer.Option(callback=positive, help="Seconds measured at each point.")] = 5.0
    warmup: Annotated[float, typer.Option(callback=not_negative, help="Seconds before that.")] = 1.5
    questions: Annotated[
        int, typer.Option(callback=at_least_one, metavar="N", help="Short requests; there are fewer of other kinds.")
    ] = 400
    data: Annotated[
        Path, typer.Option(metavar="FILE", show_default="gate.json of the checkpoint", help="SQuAD file.")
    ] = CHECKPOINT / "gate.json"
    phases: Annotated[
        list[str],
        typer.Option(metavar="PHASE", show_default="all", help=f"Some of {', '.join(PHASES)}; may be repeated."),
    ] = field(default_factory=lambda: [*PHASES])
    processes: Annotated[
        int, typer.Option(callback=at_least_one, metavar="N", help="Processes of the load's clients.")
    ] = 1
    balancer: Annotated[
        Literal["haproxy", "none"], typer.Option(help="Load balancer; none goes with one replica only.")
    ] = "haproxy"
    repository: Annotated[
        Path,
        typer.Option(metavar="DIR", show_default="model_repository of the project", help="Model repository to serve."),
    ] = PROJECT / "model_repository"
    checkpoint: Annotated[
        Path,
        typer.Option(
            metavar="DIR", show_default="that of the project", help="Build an engine from this if there is none."
        ),
    ] = CHECKPOINT
    output: Annotated[Path, typer.Option(metavar="DIR", help="Directory of the results.")] = Path("runs/loadtest")
    stop_after: Annotated[
        float,
        typer.Option(
            metavar="MINUTES",
            show_default="the last point",
            help="End after this time; the same command continues.",
        ),
    ] = math.inf
    quick: Annotated[
        bool, typer.Option("--quick", help="Measure a few points for a few seconds, to see whether it all works.")
    ] = False

    def __post_init__(self) -> None:
        if self.quick:
            few = {"clients": [1, 4, 16, 64], "replicas": [1, 2], "instances": [2]}
            for name, value in {**few, "seconds": 3.0, "warmup": 1.0, "questions": 80}.items():
                object.__setattr__(self, name, value)
        if unknown := [name for name in self.phases if name not in PHASES]:
            raise ValueError(f"--phases: must be some of {', '.join(PHASES)}, not {unknown[0]!r}")
        if self.balancer == "none" and self.replicas != [1]:
            raise ValueError("--balancer none: goes with --replicas 1 alone")
        if min([*self.clients, *self.replicas, *self.instances]) < 1:
            raise ValueError("--clients, --replicas, --instances: must be at least 1")


@command(app, SweepOptions, extra="loadtest")
def loadtest(options: SweepOptions) -> None:
    """Measure throughput against clients, replicas and engines.

    Starts all servers itself and writes tables, figures and a page. Every point is written when it is measured; the
    same command with the same --output continues where it ended.
    """
    from loadtest.servers import ServerFailed  # noqa: PLC0415
    from loadtest.sweep import main  # noqa: PLC0415

    try:
        main(options)
    except ServerFailed as error:
        raise CommandError(str(error), Exit.NO) from error


@dataclass(frozen=True, kw_only=True)
class ServiceOptions:
    """Options of ``python -m loadtest.measure_service``; those that are lists may be given several times."""

    data: Annotated[
        Path, typer.Option(metavar="FILE", show_default="gate.json of the project's checkpoint", help="SQuAD file.")
    ] = CHECKPOINT / "gate.json"
    repositories: Annotated[
        list[Path],
        typer.Option(
            "--repository",
            metavar="DIR",
            show_default="model_repository of the project",
            help="Model repository to measure; may be repeated, and then they take turns.",
        ),
    ] = field(default_factory=lambda: [PROJECT / "model_repository"])
    clients: Annotated[
        list[int], typer.Option(metavar="N", show_default="1, 2, 4, 8, 16", help="Number of clients; may be repeated.")
    ] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    seconds: Annotated[float, typer.Option(callback=positive, help="Seconds of each measurement.")] = 5.0
    sleep_ms: Annotated[
        float,
        typer.Option(callback=not_negative, metavar="MS", help="Call time of the sleeping engine; 0 leaves it out."),
    ] = 40.0
    sleepers: Annotated[
        int, typer.Option(callback=at_least_one, metavar="N", help="Instances of the sleeping engine.")
    ] = 4
    chart: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Draw throughput and p99 of the repositories in this file.")
    ] = None
    long: Annotated[bool, typer.Option("--long", help="Measure long texts too, with the sleeping engine.")] = False

    def __post_init__(self) -> None:
        if min(self.clients) < 1:
            raise ValueError("--clients: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class AdmissionOptions:
    """Options of ``python -m loadtest.measure_admission``."""

    data: Annotated[
        Path, typer.Option(metavar="FILE", show_default="gate.json of the project's checkpoint", help="SQuAD file.")
    ] = CHECKPOINT / "gate.json"
    repository: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            show_default="model_repository of the project",
            help="Model repository to take the tokenizer and the limits from.",
        ),
    ] = PROJECT / "model_repository"
    sleep_ms: Annotated[float, typer.Option(callback=positive, metavar="MS", help="Time of an engine call.")] = 300.0
    instances: Annotated[int, typer.Option(callback=at_least_one, metavar="N", help="Engine calls at one time.")] = 2
    requests: Annotated[
        int, typer.Option(callback=at_least_one, metavar="N", help="Requests of the eight clients.")
    ] = 1_000
    seconds: Annotated[float, typer.Option(callback=positive, help="Seconds of each other row.")] = 60.0


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Options of ``python -m loadtest.compare_servers``; those that are lists may be given several times."""

    checkpoint: _Checkpoint = CHECKPOINT
    data: Annotated[
        Path | None, typer.Option(metavar="FILE", show_default="gate.json of the checkpoint", help="SQuAD file.")
    ] = None
    peers_python: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            show_default=".venv-peers/bin/python, made by `make bench-peers`",
            help="Python of the environment with the other servers.",
        ),
    ] = PROJECT / ".venv-peers" / "bin" / "python"
    only: Annotated[
        list[str], typer.Option(metavar="NAME", show_default="all", help="Server to measure; may be repeated.")
    ] = field(default_factory=list)
    clients: Annotated[
        list[int], typer.Option(metavar="N", show_default="1, 8, 64", help="Number of clients; may be repeated.")
    ] = field(default_factory=lambda: [1, 8, 64])
    seconds: Annotated[float, typer.Option(callback=positive, help="Seconds of each load.")] = 3.0
    rounds: Annotated[int, typer.Option(callback=at_least_one, metavar="N", help="Turns of each server.")] = 3
    questions: Annotated[int, typer.Option(callback=at_least_one, metavar="N", help="Questions for EM and F1.")] = 500

    def __post_init__(self) -> None:
        if min(self.clients) < 1:
            raise ValueError("--clients: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class SleepingOptions:
    """Options of ``python -m loadtest.sleeping_engine``."""

    directory: Annotated[Path, typer.Argument(help="Directory of the new model repository.")]
    milliseconds: Annotated[
        float, typer.Option(callback=not_negative, metavar="MS", help="Time to sleep for each window.")
    ] = 20.0
    instances: Annotated[
        int, typer.Option(callback=at_least_one, metavar="N", help="Windows that sleep at one time.")
    ] = 2
    source: Annotated[
        Path, typer.Option(metavar="DIR", help="Model repository to take the tokenizer and the limits from.")
    ] = Path("model_repository")


@command(service_app, ServiceOptions, extra="loadtest")
def measure_service(options: ServiceOptions) -> None:
    """Measure what the service adds to its engine: throughput and latency against clients, overload, long texts.

    Starts the product with the engine of the repository, and again with one that sleeps, so that cores are not the
    limit. Prints Markdown tables.
    """
    from loadtest.measure_service import main  # noqa: PLC0415

    main(options)


@command(admission_app, AdmissionOptions, extra="loadtest")
def measure_admission(options: AdmissionOptions) -> int:
    """Measure admission: clients that do not try again, at and beyond what a slow engine can answer.

    Starts the product with an engine that sleeps. Prints a table and the goals; ends with exit code 1 if one is missed.
    """
    from loadtest.measure_admission import main  # noqa: PLC0415

    return main(options)


@command(compare_app, CompareOptions, extra="loadtest")
def compare_servers(options: CompareOptions) -> None:
    """Compare the service with the servers that people would pick instead: throughput, latency, memory, EM and F1.

    All servers get the same questions, take turns, and have the machine to themselves. Prints a Markdown table.
    """
    from loadtest.compare_servers import main  # noqa: PLC0415

    main(options)


@command(sleeping_app, SleepingOptions, extra="loadtest")
def sleeping_engine(options: SleepingOptions) -> None:
    """Write a model repository whose engine sleeps a fixed time instead of computing.

    Serve it with `bertqa serve --repository DIRECTORY`.
    """
    from bertqa.manifest import BundleMismatch  # noqa: PLC0415
    from loadtest.sleeping_engine import write_repository  # noqa: PLC0415

    seconds = options.milliseconds / 1000
    try:
        write_repository(options.directory, source=options.source, seconds=seconds, instances=options.instances)
    except (BundleMismatch, OSError) as error:
        raise CommandError(str(error), Exit.NO) from error
