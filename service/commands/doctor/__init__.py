"""``bertqa doctor``: look for what would go wrong, before it does, and say how to fix it.

Each module here looks at one thing and yields `Finding`s; `diagnose` runs them in the order in which one needs another.
Nothing is changed, and the doctor may run beside a service that answers.
"""

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from bertqa.cli.command import Exit, OutputFormat, addresses, command, group
from service.commands.options import LOOPBACK, Port, RepositoryOptions, settings

if TYPE_CHECKING:
    from service.settings import Settings

app = group("Look for what would go wrong, and say how to fix it.")


@dataclass(frozen=True, kw_only=True)
class DoctorOptions(RepositoryOptions):
    """Options of ``bertqa doctor``."""

    triton_url: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            callback=addresses,
            show_default="the one that `bertqa serve` would start",
            help="gRPC address of a running Triton, or several separated by commas.",
        ),
    ] = None
    host: Annotated[str, typer.Option(help="Address that the service would listen on.")] = LOOPBACK
    port: Port = 8000
    triton_grpc_port: Annotated[
        int, typer.Option(min=0, max=65535, metavar="PORT", help="gRPC port of the Triton that would be started.")
    ] = 8001
    format: Annotated[OutputFormat, typer.Option(help="Print text for people or JSON for machines.")] = "text"

    @property
    def settings(self) -> "Settings":
        """The settings of the service."""
        return settings()


@command(app, DoctorOptions, extra="service")
def doctor(options: DoctorOptions) -> int:
    """Look for what would go wrong, and say how to fix it.

    Prints a line for each thing it looked at: ok, WARN for what works worse than it could, FAIL for what does not
    work. Ends with exit code 1 if something fails. It changes nothing and may run beside a service that answers.
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
