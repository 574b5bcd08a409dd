"""``bertqa doctor``: find problems before they occur, and say how to fix them.

Each module checks one thing and yields `Finding`s; `diagnose` runs them in the order of their dependencies. The doctor
changes nothing and may run next to a running service.
"""

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from bertqa.cli.command import Exit, OutputFormat, addresses, command, group
from service.commands.options import LOOPBACK, Port, RepositoryOptions, settings

if TYPE_CHECKING:
    from service.settings import Settings

app = group("Find problems, and say how to fix them.")


@dataclass(frozen=True, kw_only=True)
class DoctorOptions(RepositoryOptions):
    """Options of ``bertqa doctor``."""

    triton_url: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            callback=addresses,
            show_default="the Triton of `bertqa serve`",
            help="gRPC address of a running Triton, or several separated by commas.",
        ),
    ] = None
    host: Annotated[str, typer.Option(help="IP address that the service would listen on.")] = LOOPBACK
    port: Port = 8000
    triton_grpc_port: Annotated[
        int, typer.Option(min=0, max=65535, metavar="PORT", help="gRPC port of the embedded Triton.")
    ] = 8001
    format: Annotated[OutputFormat, typer.Option(help="Print text for people or JSON for machines.")] = "text"

    @property
    def settings(self) -> "Settings":
        """Read the settings of the service."""
        return settings()


@command(app, DoctorOptions, extra="service")
def doctor(options: DoctorOptions) -> int:
    """Find problems, and say how to fix them.

    Prints one line per check: ok, WARN for something that works but not well, FAIL for something that does not work.
    Ends with exit code 1 if a check fails. It changes nothing and may run next to a running service.
    """
    from service.commands.doctor.diagnose import diagnose  # noqa: PLC0415

    found = []
    for finding in diagnose(options):
        found.append(finding)
        if options.format == "text":
            print(finding, flush=True)
    if options.format == "json":
        print(json.dumps([asdict(finding) for finding in found], indent=1))
    return Exit.NO if any(finding.level == "FAIL" for finding in found) else Exit.OK
