"""Options that several commands of the service share, and the settings of the service."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bertqa.cli.command import CommandError, addresses

if TYPE_CHECKING:
    from service.settings import Settings

PROJECT = Path(__file__).resolve().parent.parent.parent
LOOPBACK = "127.0.0.1"

Repository = Annotated[
    Path,
    typer.Option(
        envvar="BERTQA_REPOSITORY",
        metavar="DIR",
        show_default="model_repository of the project",
        help="Model repository that Triton serves.",
    ),
]
Port = Annotated[int, typer.Option(min=0, max=65535, metavar="PORT", help="Port of the service; 0 takes any free one.")]


@dataclass(frozen=True, kw_only=True)
class RepositoryOptions:
    """Options of the commands that work on a model repository."""

    repository: Repository = PROJECT / "model_repository"


@dataclass(frozen=True, kw_only=True)
class TritonOptions(RepositoryOptions):
    """Options of the commands that also call Triton."""

    triton_url: Annotated[
        str,
        typer.Option(
            envvar="BERTQA_TRITON_URL",
            metavar="HOST:PORT",
            callback=addresses,
            help="gRPC address of Triton, or several separated by commas; a host name means all its addresses.",
        ),
    ] = "127.0.0.1:8001"


def settings() -> "Settings":
    """Read the settings of the service from the environment.

    Raises:
        CommandError: a setting is invalid.
    """
    from service.settings import Settings, SettingsError  # noqa: PLC0415

    try:
        return Settings.from_environment(os.environ)
    except SettingsError as error:
        raise CommandError(str(error)) from error
