"""Commands whose options are the fields of a dataclass: type, default and help of an option are written once.

A field is ``Annotated[type, typer.Option(help=…)]``, and jobs share options by inheritance. Modules that define
commands import little, so ``--help`` needs only Typer, which the extra ``cli`` installs. A command imports the rest
when it runs.
"""

import inspect
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from enum import IntEnum
from typing import Any, ClassVar, Literal, Protocol, TypeVar, get_type_hints

import typer
from typer.main import get_command
from typer.models import ArgumentInfo

OutputFormat = Literal["text", "json"]
OURS = ("bertqa", "service", "engine_builder", "training", "loadtest")
"""Our own packages: a missing module of these is a bug, not a missing extra."""
CHECKOUT = "pip install --constraint constraints.txt --editable '.[{}]' in a checkout of the project"


class Exit(IntEnum):
    """Exit codes of every command; docs/operations.md lists them."""

    OK = 0
    NO = 1
    """There is no answer, or the command could not do its work."""
    USAGE = 2
    """The command line, a setting, a named file or the request is invalid."""
    UNREACHABLE = 3
    """The service cannot be reached."""
    SERVER = 4
    """The service failed, or was still busy at the timeout."""
    BELOW = 5
    """The measured quality is below the required minimum."""


class CommandError(Exception):
    """Ends a command; the message is printed on standard error."""

    def __init__(self, message: str, code: Exit = Exit.USAGE) -> None:
        super().__init__(message)
        self.code = code


class _Options(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


T = TypeVar("T", bound=_Options)


def group(help: str, **options: Any) -> typer.Typer:
    """Make a group of commands, or a single command if only one is added, with help in plain text."""
    options = {"add_completion": False, "no_args_is_help": True, **options}
    return typer.Typer(help=help, rich_markup_mode=None, pretty_exceptions_enable=False, **options)


def say(line: str) -> None:
    """Print a line for the user on standard error."""
    print(f"bertqa: {line}", file=sys.stderr, flush=True)


def command(
    app: typer.Typer, options: type[T], *, extra: str, name: str | None = None, help: str | None = None
) -> Callable[[Callable[[T], int | None]], Callable[[T], int | None]]:
    """Register the decorated function as a command that is called with its options and returns its exit code.

    Args:
        app: application to add the command to.
        options: a dataclass; a `ValueError` from its constructor is reported as a usage error.
        extra: extra in pyproject.toml with the packages that the command imports.
        name: of the command; default: the name of the function.
        help: default: the docstring of the function.
    """

    def register(run: Callable[[T], int | None]) -> Callable[[T], int | None]:
        def callback(**values: Any) -> None:
            try:
                given = options(**values)
            except ValueError as error:
                raise CommandError(str(error)) from error
            raise typer.Exit(run(given) or 0)

        def guarded(**values: Any) -> None:
            try:
                callback(**values)
            except CommandError as error:
                say(f"error: {error}")
                raise typer.Exit(error.code) from None
            except SystemExit as end:
                if not isinstance(end.code, str):
                    raise
                say(f"error: {end.code}")
                raise typer.Exit(Exit.NO) from None
            except ModuleNotFoundError as error:
                if error.name is None or error.name.partition(".")[0] in OURS:
                    raise
                say(f"error: this command needs the package {error.name}: {CHECKOUT.format(extra)}")
                raise typer.Exit(Exit.USAGE) from None

        guarded.__signature__ = _signature(options)  # type: ignore[attr-defined]
        guarded.__annotations__ = get_type_hints(options, include_extras=True)
        guarded.__doc__ = help or run.__doc__
        app.command(name or run.__name__.replace("_", "-"), no_args_is_help=False)(guarded)
        return run

    return register


def parse(options: type[T], argv: Sequence[str], prog: str = "bertqa") -> T:
    """Parse a command line into options; a usage error ends the process with exit code 2, as in a command.

    Raises:
        SystemExit: the command line is invalid, or asks for help.
    """
    found: list[T] = []
    app = group("")
    command(app, options, extra="cli")(found.append)
    try:
        get_command(app).main([*argv], prog_name=prog)
    except SystemExit:
        if not found:
            raise
    return found[0]


def status(app: typer.Typer, argv: Sequence[str], prog: str = "bertqa") -> int:
    """Run a command in this process; returns its exit code."""
    try:
        get_command(app).main([*argv], prog_name=prog)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def run(app: typer.Typer, prog: str) -> None:
    """Run a command with the arguments of this process, then end the process."""
    get_command(app).main(prog_name=prog)


def _signature(options: type[_Options]) -> inspect.Signature:
    """Make a parameter for each field: arguments first, then options, own fields before inherited ones."""
    hints, known = get_type_hints(options, include_extras=True), {field.name: field for field in fields(options)}
    arguments = [name for name in known if any(isinstance(each, ArgumentInfo) for each in _metadata(hints[name]))]
    own = [name for each in options.__mro__ for name in vars(each).get("__annotations__", {}) if name in known]
    parameters = []
    for name in dict.fromkeys([*arguments, *own]):
        field, default = known[name], inspect.Parameter.empty
        if field.default is not MISSING:
            default = field.default
        elif field.default_factory is not MISSING:
            default = field.default_factory()
        if field.init:
            kind = inspect.Parameter.KEYWORD_ONLY
            parameters.append(inspect.Parameter(name, kind, default=default, annotation=hints[name]))
    return inspect.Signature(parameters)


def _metadata(hint: Any) -> tuple[Any, ...]:
    return getattr(hint, "__metadata__", ())


def positive(value: float | None) -> float | None:
    """Check that an option is a number above 0."""
    if value is not None and not 0 < value < math.inf:
        raise typer.BadParameter(f"must be above 0, not {value}")
    return value


def not_negative(value: float | None) -> float | None:
    """Check that an option is 0 or above."""
    if value is not None and not 0 <= value < math.inf:
        raise typer.BadParameter(f"must be 0 or above, not {value}")
    return value


def fraction(value: float | None) -> float | None:
    """Check that an option is a share from 0 to below 1."""
    if value is not None and not 0 <= value < 1:
        raise typer.BadParameter(f"must be a share, from 0 to below 1, not {value}")
    return value


def at_least_one(value: int | None) -> int | None:
    """Check that an option is at least 1."""
    if value is not None and value < 1:
        raise typer.BadParameter(f"must be at least 1, not {value}")
    return value


def addresses(value: str | None) -> str | None:
    """Check that an option is one address host:port, or several separated by commas."""
    if value is not None and not all(part.strip() for part in value.split(",")):
        raise typer.BadParameter(f"must be host:port, or several separated by commas, not {value!r}")
    return value
