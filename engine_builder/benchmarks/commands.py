"""Command lines of the builder's benchmarks; they need Typer alone, and import a benchmark when it runs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from bertqa.cli.command import CommandError, Exit, at_least_one, command, group, not_negative, positive

BUCKETS = ("64,128,256,384,512", "64,128,256,384", "64,128,192,256,384", "64,128,160,192,256,384")
"""Lists that `compare_buckets` compares by default."""

runtimes_app = group("Compare the speed and F1 of runtimes.", no_args_is_help=False)
buckets_app = group("Compare the speed of lists of buckets.", no_args_is_help=False)
floor_app = group("Measure the floor that the hardware sets.", no_args_is_help=False)

_Data = Annotated[Path, typer.Option(metavar="SQUAD_JSON", help="SQuAD file with the questions and texts.")]
_Repository = Annotated[Path, typer.Option(metavar="DIR", help="Model repository with the engine.")]


def _number(value: int) -> int:
    not_negative(value)
    return value


@dataclass(frozen=True, kw_only=True)
class RuntimesOptions:
    """Options of ``python -m engine_builder.benchmarks.compare_runtimes``."""

    checkpoint: Annotated[
        str, typer.Option(metavar="DIR_OR_HUB_ID", help="Model for question answering: a directory or a hub id.")
    ]
    data: _Data
    calibration_data: Annotated[
        Path | None,
        typer.Option(
            metavar="SQUAD_JSON",
            show_default="calibration.json of the checkpoint",
            help="SQuAD file to calibrate int8 and fp8 with.",
        ),
    ] = None
    questions: Annotated[
        int, typer.Option(callback=_number, metavar="N", help="Questions to measure F1 on; 0 measures no F1.")
    ] = 500
    rounds: Annotated[
        int, typer.Option(callback=at_least_one, metavar="N", help="Turns of each runtime at each length.")
    ] = 10
    threads: Annotated[
        int, typer.Option(callback=_number, metavar="N", help="Cores for each runtime; 0 takes all.")
    ] = 0
    lengths: Annotated[
        list[int],
        typer.Option(metavar="N", show_default="all of the model", help="Bucket to time, in tokens; may be repeated."),
    ] = field(default_factory=list)
    chart: Annotated[Path | None, typer.Option(metavar="PNG", help="Draw the times as bars in this file.")] = None

    def __post_init__(self) -> None:
        if self.chart and not self.chart.absolute().parent.is_dir():
            raise ValueError(f"--chart {self.chart}: there is no such directory to write it in")


@dataclass(frozen=True, kw_only=True)
class BucketsOptions:
    """Options of ``python -m engine_builder.benchmarks.compare_buckets``."""

    data: _Data
    repository: _Repository = Path("model_repository")
    questions: Annotated[
        int, typer.Option(callback=at_least_one, metavar="N", help="Questions, spread over the data.")
    ] = 500
    rounds: Annotated[int, typer.Option(callback=at_least_one, metavar="N", help="Runs of every window.")] = 2
    threads: Annotated[int, typer.Option(callback=_number, metavar="N", help="Cores for the engine; 0 takes all.")] = 0
    buckets: Annotated[
        list[str],
        typer.Option(metavar="N,N,N", show_default=" and ".join(BUCKETS), help="List of lengths; may be repeated."),
    ] = field(default_factory=lambda: [*BUCKETS])

    def __post_init__(self) -> None:
        self.lists()

    def lists(self) -> list[tuple[int, ...]]:
        """The lists of lengths, each in rising order.

        Raises:
            ValueError: a list holds something else than positive numbers.
        """
        for each in self.buckets:
            if not all(length.strip().isdecimal() and int(length) for length in each.split(",")):
                raise ValueError(f"--buckets {each}: must be lengths such as 64,128,256")
        return [tuple(sorted(map(int, each.split(",")))) for each in self.buckets]


@dataclass(frozen=True, kw_only=True)
class FloorOptions:
    """Options of ``python -m engine_builder.benchmarks.hardware_floor``."""

    checkpoint: Annotated[Path, typer.Option(metavar="DIR", help="Checkpoint with the config.json of the encoder.")]
    repository: _Repository = Path("model_repository")
    seconds: Annotated[float, typer.Option(callback=positive, help="Seconds of each measurement.")] = 3.0


@command(runtimes_app, RuntimesOptions, extra="builder")
def compare_runtimes(options: RuntimesOptions) -> None:
    """Compare the speed of runtimes for a checkpoint, and what each costs in F1.

    Prints a Markdown table. The framework that trained the checkpoint and every engine that runs on this machine get
    the same windows, one at a time and in turns, so that a busy minute slows all of them alike. A call is timed from
    array to array. TensorRT is the exception: its time is the GPU's own time for a CUDA graph, which is how Triton
    runs it. A runtime that is missing here has a line that says why.
    """
    from engine_builder.benchmarks.compare_runtimes import main  # noqa: PLC0415

    _run(lambda: main(options))


@command(buckets_app, BucketsOptions, extra="builder")
def compare_buckets(options: BucketsOptions) -> None:
    """Compare lists of length buckets on real windows: time of a call, padding and memory.

    A window is padded to the shortest bucket that holds it. More buckets mean less padding, but each costs memory in
    every process that holds the engine. Each list gets its own process, and the processes take turns.
    """
    from engine_builder.benchmarks.compare_buckets import main  # noqa: PLC0415

    _run(lambda: main(options))


@command(floor_app, FloorOptions, extra="builder")
def hardware_floor(options: FloorOptions) -> None:
    """Measure how fast the encoder could be on this CPU, and compare the engine with that.

    Divides the operations of a window by the rate of a large matrix product in OpenVINO, and the bytes of the weights
    by the memory bandwidth. Softmax, LayerNorm and GELU are not counted, so no engine reaches this floor.
    """
    from engine_builder.benchmarks.hardware_floor import main  # noqa: PLC0415

    _run(lambda: main(options))


def _run(benchmark: Callable[[], None]) -> None:
    from bertqa.manifest import BundleMismatch  # noqa: PLC0415
    from bertqa.squad import MalformedSquad  # noqa: PLC0415
    from engine_builder.checkpoint import InvalidCheckpoint  # noqa: PLC0415
    from engine_builder.publish import BuildRefused  # noqa: PLC0415

    try:
        benchmark()
    except (InvalidCheckpoint, BuildRefused, BundleMismatch, MalformedSquad, OSError) as error:
        raise CommandError(str(error), Exit.NO) from error
