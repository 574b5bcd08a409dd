"""``bertqa build`` and ``python -m engine_builder``: build an engine, measure it, and publish it."""

import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from bertqa.cli.command import CommandError, Exit, at_least_one, command, group, not_negative, positive
from bertqa.manifest import MODEL_NAME
from bertqa.targets import TargetName

MAX_BATCH_SIZE = 256

app = group("Build an engine for Triton.")


def _gpus(text: str | None) -> str | None:
    if text is not None:
        numbers = text.split(",")
        if not all(number.isdecimal() for number in numbers) or len(set(numbers)) != len(numbers):
            raise typer.BadParameter(f"must be different numbers such as 0,1, not {text!r}")
    return text


@dataclass(frozen=True, kw_only=True)
class BuildArguments:
    """Options of ``bertqa build``; all but ``gpus`` are those of `engine_builder.build.BuildOptions`."""

    checkpoint: Annotated[
        str, typer.Option(metavar="DIR_OR_HUB_ID", help="Question-answering checkpoint: a directory or a hub id.")
    ]
    target: Annotated[TargetName, typer.Option(help="Runtime and processor to build for.")]
    precision: Annotated[
        Literal["fp32", "fp16", "bf16", "int8", "fp8"] | None,
        typer.Option(
            show_default="cpu: the fastest that this machine's instructions allow; tensorrt: fp16",
            help="Precision of the engine: fp32, bf16 or int8 for cpu; fp16, fp32, bf16, int8 or fp8 for tensorrt.",
        ),
    ] = None
    repository: Annotated[Path, typer.Option(metavar="DIR", help="Model repository to publish to.")] = Path(
        "model_repository"
    )
    model: Annotated[str, typer.Option(metavar="NAME", help="Name of the model in the repository.")] = MODEL_NAME
    version: Annotated[
        int | None,
        typer.Option(
            callback=at_least_one,
            metavar="N",
            show_default="one above the latest",
            help="Number of the version to publish.",
        ),
    ] = None
    activate: Annotated[
        bool,
        typer.Option(
            "--activate",
            help="Make the version active at once. By default only a model's first version becomes active; use "
            "`bertqa models` to check later ones and switch to them.",
        ),
    ] = False
    gate_data: Annotated[
        Path | None,
        typer.Option(
            metavar="SQUAD_JSON",
            show_default="gate.json of the checkpoint",
            help="SQuAD file with questions to measure F1 on.",
        ),
    ] = None
    calibration_data: Annotated[
        Path | None,
        typer.Option(
            metavar="SQUAD_JSON",
            show_default="calibration.json of the checkpoint",
            help="SQuAD file with questions to calibrate int8 and fp8 on; use other questions than in --gate-data.",
        ),
    ] = None
    max_f1_loss: Annotated[
        float,
        typer.Option(callback=not_negative, help="Largest allowed loss of F1 against float32, in percentage points."),
    ] = 0.5
    max_logit_error: Annotated[
        float | None,
        typer.Option(
            callback=positive,
            show_default="by precision, from 0.001 for fp32 to 0.25 for int8",
            help="Largest allowed error of the logits against float32, as a share of their standard deviation.",
        ),
    ] = None
    max_batch_size: Annotated[
        int,
        typer.Option(
            min=1, max=MAX_BATCH_SIZE, metavar="N", help="Most windows that Triton may batch into one engine call."
        ),
    ] = 1
    optimization_level: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=5,
            metavar="N",
            show_default="TensorRT's default, 3",
            help="Optimization level: higher builds longer, for a faster engine.",
        ),
    ] = None
    timing_cache: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="TensorRT's timing cache; read if the file exists, and written after the build."
        ),
    ] = None
    version_compatible: Annotated[
        bool,
        typer.Option(
            "--version-compatible",
            help="Build for later versions of TensorRT too; Triton then needs "
            "--backend-config=tensorrt,version-compatible=true.",
        ),
    ] = False
    hardware_compatible: Annotated[
        bool,
        typer.Option(
            "--hardware-compatible", help="Build for all GPUs from Ampere on; the engine is slower on each of them."
        ),
    ] = False
    instances: Annotated[
        int | None,
        typer.Option(
            callback=at_least_one,
            metavar="N",
            show_default="the current value, or 2 for a new model",
            help="Engine instances that Triton runs in parallel.",
        ),
    ] = None
    threads: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            show_default="the current value, or 0 for a new model",
            help="CPU cores per engine instance; 0 means all.",
        ),
    ] = None
    gpus: Annotated[
        str | None,
        typer.Option(
            callback=_gpus,
            metavar="N,N",
            show_default="the current value, or all for a new model",
            help="GPUs that run the instances, such as 0,1.",
        ),
    ] = None


@command(app, BuildArguments, extra="builder")
def build(options: BuildArguments) -> None:
    """Build an engine for Triton.

    Builds it from a checkpoint, measures it against the float32 model, and publishes it as a version of the model.
    """
    from bertqa.manifest import BundleMismatch  # noqa: PLC0415
    from bertqa.repository import ChangeRefused  # noqa: PLC0415
    from bertqa.squad import MalformedSquad  # noqa: PLC0415
    from engine_builder.build import BuildOptions  # noqa: PLC0415
    from engine_builder.build import build as build_engine  # noqa: PLC0415
    from engine_builder.checkpoint import InvalidCheckpoint  # noqa: PLC0415
    from engine_builder.gate import GateFailed  # noqa: PLC0415
    from engine_builder.publish import BuildRefused  # noqa: PLC0415

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # exit normally, so that a stopped build cleans up
    gpus = tuple(map(int, options.gpus.split(","))) if options.gpus else None
    try:
        build_engine(BuildOptions(**{**vars(options), "gpus": gpus}))
    except (BuildRefused, ChangeRefused, InvalidCheckpoint, BundleMismatch, MalformedSquad, GateFailed) as error:
        raise CommandError(str(error), Exit.NO) from error
