"""Command line of ``python -m training.measure_training``; it needs Typer alone, and imports the rest when it runs."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from bertqa.cli.command import at_least_one, command, group
from bertqa.manifest import TOKENIZER_FILE

CHECKPOINT = Path(__file__).resolve().parent.parent / "checkpoints" / "minilm-l6-squad"
PRECISIONS = ("fp32", "bf16")

app = group("Measure the speed of training.", no_args_is_help=False)


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """Options of ``python -m training.measure_training``."""

    output: Annotated[Path, typer.Option(metavar="DIR", help="Directory of the JSON file and the figures.")] = Path(
        "runs/speed"
    )
    gpu_suite: Annotated[
        bool, typer.Option("--gpu-suite", help="Measure BERT-large on a GPU instead of the comparison.")
    ] = False
    redraw: Annotated[
        bool, typer.Option("--redraw", help="Draw the figures in --output again and measure nothing.")
    ] = False
    quick: Annotated[bool, typer.Option("--quick", help="Use a tiny model and few sequences, to try the job out.")] = (
        False
    )
    config: Annotated[
        str | None,
        typer.Option(metavar="NAME", show_default="mini; large with --gpu-suite", help="Size of the model."),
    ] = None
    data: Annotated[
        Path,
        typer.Option(metavar="FILE", show_default="gate.json of the project's checkpoint", help="SQuAD file."),
    ] = CHECKPOINT / "gate.json"
    tokenizer: Annotated[
        Path, typer.Option(metavar="FILE", show_default="that of the project's checkpoint", help="tokenizer.json.")
    ] = CHECKPOINT / TOKENIZER_FILE
    sequences: Annotated[
        int, typer.Option(callback=at_least_one, metavar="N", help="Sequences of an epoch; each repeat takes all.")
    ] = 256
    batch_size: Annotated[
        int, typer.Option(callback=at_least_one, metavar="N", help="Sequences of one process in a step.")
    ] = 32
    micro_batch_size: Annotated[
        int, typer.Option(callback=at_least_one, metavar="N", help="Sequences of a part of a step.")
    ] = 8
    repeats: Annotated[
        int, typer.Option(callback=at_least_one, metavar="N", help="Repeats of everything, earlier runs included.")
    ] = 3
    precisions: Annotated[
        list[str],
        typer.Option(metavar="fp32|bf16", show_default="both, or fp32 if bf16 is slower here", help="May be repeated."),
    ] = field(default_factory=list)
    processes: Annotated[
        int, typer.Option(callback=at_least_one, metavar="N", help="Processes of the larger launch.")
    ] = 2
    compile: Annotated[bool, typer.Option("--compile/--no-compile", help="Measure torch.compile too.")] = True
    plan: Annotated[Path | None, typer.Option(hidden=True)] = None  # what a launch of our own measures

    def __post_init__(self) -> None:
        if self.quick:
            few = {"sequences": 8 * self.processes, "batch_size": 4, "micro_batch_size": 2, "repeats": 1}
            for name, value in {"config": self.config or "tiny", **few}.items():
                object.__setattr__(self, name, value)
        if unknown := [each for each in self.precisions if each not in PRECISIONS]:
            raise ValueError(f"--precisions: must be {' or '.join(PRECISIONS)}, not {unknown[0]!r}")
        if self.sequences % (self.batch_size * self.processes):
            raise ValueError("--sequences must be a multiple of --batch-size times --processes, so that all are used")
        if self.batch_size % self.micro_batch_size:
            raise ValueError("--batch-size must be a multiple of --micro-batch-size")


@command(app, MeasureOptions, extra="training")
def measure_training(options: MeasureOptions) -> None:
    """Measure the speed of training, side by side with the Hugging Face Trainer; print tables and draw figures.

    Compares, on this machine and in one run: one process and several, fp32 and bf16, ways to make batches, AdamW and
    LAMB, our loop and the Trainer. All repeats are interleaved and kept in --output: the same command continues a run
    that ended early, and a larger --repeats adds to it. With --gpu-suite it measures BERT-large on a GPU, next to
    NVIDIA's published numbers; under horovodrun on several.
    """
    from training.measure_training import main  # noqa: PLC0415

    main(options)
