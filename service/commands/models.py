"""``bertqa models``: roll out a version of a model, or roll back to the previous one."""

import json
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from bertqa.cli.command import CommandError, Exit, OutputFormat, command, group, positive, say
from service.commands.options import TritonOptions, settings

if TYPE_CHECKING:
    from service.commands.rollout import Rollout

app = group("Roll out a version of a model, or roll back to the previous one.")


@dataclass(frozen=True, kw_only=True)
class StepOptions(TritonOptions):
    """Options of every ``bertqa models`` command."""

    timeout: Annotated[
        float, typer.Option(callback=positive, metavar="SECONDS", help="Timeout of waiting for Triton.")
    ] = 300.0


@dataclass(frozen=True, kw_only=True)
class ListOptions(StepOptions):
    """Options of ``bertqa models list``."""

    format: Annotated[OutputFormat, typer.Option(help="Print text for people or JSON for machines.")] = "text"


@dataclass(frozen=True, kw_only=True)
class ModelOptions(StepOptions):
    """Options of the commands that take a model."""

    model: Annotated[str, typer.Argument(help="Name of the model.")]


@dataclass(frozen=True, kw_only=True)
class VersionOptions(ModelOptions):
    """Options of the commands that take a version."""

    version: Annotated[int, typer.Argument(help="Version of the model.")]


_UNCHECKED = typer.Option("--unchecked", help="Skip the check of the version.")


@dataclass(frozen=True, kw_only=True)
class SwitchOptions(VersionOptions):
    """Options of ``bertqa models switch``."""

    unchecked: Annotated[bool, _UNCHECKED] = False


@dataclass(frozen=True, kw_only=True)
class RollbackOptions(ModelOptions):
    """Options of ``bertqa models rollback``."""

    unchecked: Annotated[bool, _UNCHECKED] = False


@dataclass(frozen=True, kw_only=True)
class UnloadOptions(VersionOptions):
    """Options of ``bertqa models unload``."""

    force: Annotated[bool, typer.Option("--force", help="Unload the version even if it still gets requests.")] = False


@command(app, ListOptions, extra="service", name="list")
def list_models(options: ListOptions) -> None:
    """List the versions of every model."""
    _take(options, lambda rollout: _print(rollout.rows(), options.format))


@command(app, VersionOptions, extra="service")
def load(options: VersionOptions) -> None:
    """Load a version next to the active one, and check it."""
    _take(options, lambda rollout: rollout.load(options.model, options.version))


@command(app, VersionOptions, extra="service")
def check(options: VersionOptions) -> None:
    """Check that a loaded version answers the questions of its build correctly."""
    _take(options, lambda rollout: rollout.check(options.model, options.version))


@command(app, SwitchOptions, extra="service")
def switch(options: SwitchOptions) -> None:
    """Check a loaded version and make it the active one."""
    _take(options, lambda rollout: rollout.switch(options.model, options.version, unchecked=options.unchecked))


@command(app, RollbackOptions, extra="service")
def rollback(options: RollbackOptions) -> None:
    """Make the previous version the active one again."""
    _take(options, lambda rollout: rollout.rollback(options.model, unchecked=options.unchecked))


@command(app, UnloadOptions, extra="service")
def unload(options: UnloadOptions) -> None:
    """Remove a version from memory, once it gets no more requests."""
    _take(options, lambda rollout: rollout.unload(options.model, options.version, force=options.force))


def _take(options: StepOptions, step: "Callable[[Rollout], object]") -> None:
    from bertqa.manifest import BundleMismatch  # noqa: PLC0415
    from bertqa.repository import ChangeRefused, Repository  # noqa: PLC0415
    from service.commands.rollout import Rollout, RolloutFailed, tls_of  # noqa: PLC0415
    from service.triton.servers import Servers, ServerUnreachable  # noqa: PLC0415

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that an interrupted load is undone
    try:
        servers = Servers([url.strip() for url in options.triton_url.split(",")], tls_of(settings()))
        try:
            step(Rollout(Repository(options.repository), servers, timeout_s=options.timeout, report=say))
        finally:
            servers.close()
    except (RolloutFailed, ServerUnreachable, ChangeRefused, BundleMismatch) as error:
        raise CommandError(str(error), Exit.NO) from error


def _print(rows: list[tuple[str, ...]], form: OutputFormat) -> None:
    if form == "json":
        names = [name.lower() for name in rows[0]]
        found = [dict(zip(names, row, strict=True)) for row in rows[1:]]
        print(json.dumps([{**row, "version": int(row["version"]), "f1": float(row["f1"])} for row in found]))
        return
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
