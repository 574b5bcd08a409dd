"""What ``bertqa ask`` and ``bertqa evaluate`` share: the options of the HTTP client, and errors as exit codes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from bertqa.cli.command import CommandError, Exit, OutputFormat, positive, say

if TYPE_CHECKING:
    from bertqa.client import Client


@dataclass(frozen=True, kw_only=True)
class ServiceOptions:
    """Options of commands that call the service."""

    url: Annotated[str, typer.Option(envvar="BERTQA_URL", metavar="URL", help="Address of the service.")] = (
        "http://127.0.0.1:8000"
    )
    timeout: Annotated[
        float,
        typer.Option(
            callback=positive,
            metavar="SECONDS",
            help="Give up on a question after this time, including waits while the service is busy.",
        ),
    ] = 60.0
    format: Annotated[OutputFormat, typer.Option(help="Print text for people or JSON for machines.")] = "text"

    @contextmanager
    def client(self) -> "Iterator[Client]":
        """Connect to the service, with the API key in ``BERTQA_API_KEY`` if one is set.

        Raises:
            CommandError: the address is not a URL, or a call in the context failed.
        """
        from bertqa.client import Client, ClientError, Refused, Unreachable  # noqa: PLC0415 - --help needs no httpx

        try:
            client = Client(self.url, timeout_s=self.timeout, report=say)
        except ValueError as error:
            raise CommandError(str(error)) from error
        codes = {Refused: Exit.USAGE, Unreachable: Exit.UNREACHABLE}
        with client:
            try:
                yield client
            except ClientError as error:
                raise CommandError(str(error), codes.get(type(error), Exit.SERVER)) from error
