"""``bertqa loadtest`` and ``python -m loadtest.sweep``: throughput against clients, replicas and engines."""

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
