"""``bertqa keys``: create, list and revoke API keys."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from bertqa.cli.command import CommandError, Exit, OutputFormat, command, group, positive, say

app = group("Create, list and revoke API keys.")


@dataclass(frozen=True, kw_only=True)
class KeysOptions:
    """Options of every ``bertqa keys`` command."""

    file: Annotated[
        Path, typer.Option(envvar="BERTQA_API_KEYS_FILE", metavar="FILE", help="File with the hashes of the API keys.")
    ]


@dataclass(frozen=True, kw_only=True)
class NewOptions(KeysOptions):
    """Options of ``bertqa keys new``."""

    name: Annotated[str, typer.Argument(help="Name of the key's owner; metrics show it.")]
    rate: Annotated[
        float | None,
        typer.Option(
            callback=positive, show_default="no limit", help="Rate limit: number per second, in each process."
        ),
    ] = None
    burst: Annotated[
        float | None,
        typer.Option(callback=positive, show_default="twice the rate", help="Burst limit: number allowed at once."),
    ] = None

    per: Annotated[Literal["request", "question", "window"], typer.Option(help="What the rate counts.")] = "request"

    def __post_init__(self) -> None:
        if self.burst is not None and self.rate is None:
            raise ValueError("--burst: needs --rate")


@dataclass(frozen=True, kw_only=True)
class ListOptions(KeysOptions):
    """Options of ``bertqa keys list``."""

    format: Annotated[OutputFormat, typer.Option(help="Print text for people or JSON for machines.")] = "text"


@dataclass(frozen=True, kw_only=True)
class RevokeOptions(KeysOptions):
    """Options of ``bertqa keys revoke``."""

    name: Annotated[str, typer.Argument(help="Name of the key, as `bertqa keys list` shows it.")]


@command(app, NewOptions, extra="service")
def new(options: NewOptions) -> None:
    """Create a key: print it once, and add its hash to the file."""
    from service.api_keys import KeysError, new_key  # noqa: PLC0415

    try:
        print(new_key(options.file, options.name, options.rate, options.burst, options.per))
    except KeysError as error:
        raise CommandError(str(error), Exit.NO) from error
    say("this key is not stored anywhere; services that read the file accept it within a second")


@command(app, ListOptions, extra="service", name="list")
def list_keys(options: ListOptions) -> None:
    """List the names and limits of the keys."""
    from service.api_keys import KeysError, parse_keys  # noqa: PLC0415

    try:
        keys = parse_keys(options.file).values()
    except KeysError as error:
        raise CommandError(str(error), Exit.NO) from error
    if options.format == "json":
        limited = {key.name: math.isfinite(key.rate) for key in keys}
        print(
            json.dumps(
                [
                    {
                        "name": key.name,
                        "rate": key.rate if limited[key.name] else None,
                        "burst": key.burst if limited[key.name] else None,
                        "per": key.unit,
                    }
                    for key in keys
                ]
            )
        )
        return
    for key in keys:
        limits = "no limit" if math.isinf(key.rate) else f"{key.rate:g} {key.unit}s per second, {key.burst:g} at once"
        print(f"{key.name}  {limits}")


@command(app, RevokeOptions, extra="service")
def revoke(options: RevokeOptions) -> None:
    """Remove a key from the file; services that read the file reject it within a second."""
    from service.api_keys import KeysError, revoke_key  # noqa: PLC0415

    try:
        revoke_key(options.file, options.name)
    except KeysError as error:
        raise CommandError(str(error), Exit.NO) from error
    say(f"{options.name} is revoked; services that read the file reject it within a second")
