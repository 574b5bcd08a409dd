"""``bertqa serve`` and ``python -m service``: start Triton and the REST service."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from bertqa.cli.command import CommandError, addresses, command, group
from bertqa.manifest import MODEL_NAME, BundleMismatch
from bertqa.repository import Repository
from service.commands.options import LOOPBACK, PROJECT, Port, settings

app = group("Serve a question-answering model over REST.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """Options of ``bertqa serve``."""

    host: Annotated[str, typer.Option(help="IP address to listen on; 0.0.0.0 for all.")] = LOOPBACK
    port: Port = 8000
    workers: Annotated[int, typer.Option(min=1, metavar="N", help="Number of processes of the REST service.")] = 1
    repository: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            show_default="model_repository of the project",
            help="Model repository with the engine.",
        ),
    ] = PROJECT / "model_repository"
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            show_default="any engine; if there is none, one is built from the single checkpoint in checkpoints/",
            help="Checkpoint directory; if the repository has no engine of it, one is built.",
        ),
    ] = None
    triton_url: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            callback=addresses,
            show_default="start one",
            help="gRPC address of a running Triton, or several separated by commas; then none is started or built.",
        ),
    ] = None
    triton_grpc_port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            metavar="PORT",
            show_default="8001 or the next free one",
            help="gRPC port of the embedded Triton; 0 takes any free one.",
        ),
    ] = None
    log_dir: Annotated[Path, typer.Option(metavar="DIR", help="Directory for Triton's log.")] = Path("logs")


@command(app, ServeOptions, extra="service")
def serve(options: ServeOptions) -> int:
    """Serve a question-answering model over REST.

    Builds an engine if the repository has none, starts Triton and the REST service, restarts either if it dies, and
    stops both in order on Ctrl-C or SIGTERM. Settings are environment variables; docs/operations.md lists them.
    """
    from service.runtime.launcher import launch  # noqa: PLC0415

    _check_model(options)
    return launch(options)


def _check_model(options: ServeOptions) -> None:
    """Check the default model against the repository, before starting anything.

    Raises:
        CommandError: BERTQA_MODEL is not one of its models, or is not set and the default is unclear.
    """
    wanted = settings().model
    try:
        names = [*Repository(options.repository).serving()]
    except BundleMismatch:
        return  # the launcher reports what is wrong
    if not options.triton_url and (options.checkpoint or not names):
        names = [*dict.fromkeys([*names, MODEL_NAME])]  # will be built
    if wanted and names and wanted not in names:
        raise CommandError(f"BERTQA_MODEL: must be one of {', '.join(names)}; got {wanted!r}")
    if not wanted and len(names) > 1 and MODEL_NAME not in names:
        raise CommandError(f"BERTQA_MODEL: set it to the default model, one of {', '.join(names)}")
