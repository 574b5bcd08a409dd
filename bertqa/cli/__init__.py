"""The ``bertqa`` command: one program for the commands of every package.

The table `COMMANDS` holds names, not imports, for three reasons. Imports run one way: `service`, `training` and the
others import `bertqa`, so `bertqa` cannot import them back at load time. A user who installed only the core still gets
a full list of commands; a missing one says which extra to install. And ``bertqa ask`` starts without importing torch or
gRPC, because only the command that runs is imported.

Each command lives in the package it belongs to, in a light module that needs Typer alone, so ``--help`` works without
the package's own dependencies.
"""

import sys
from collections.abc import Iterator, MutableMapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

try:
    import typer
    from typer.core import TyperGroup
    from typer.main import get_command
except ModuleNotFoundError:
    sys.exit("bertqa: this command needs Typer: pip install --constraint constraints.txt --editable '.[cli]'")

from bertqa.cli.command import CHECKOUT, Exit, group, say

COMMANDS = {  # name: (module, its Typer application, the extra to install)
    "serve": ("service.commands.serve", "app", "service"),
    "ask": ("bertqa.cli.ask", "app", "cli"),
    "evaluate": ("bertqa.cli.evaluate", "app", "cli"),
    "build": ("engine_builder.commands", "app", "builder"),
    "train": ("training.commands", "app", "training"),
    "models": ("service.commands.models", "app", "service"),
    "keys": ("service.commands.keys", "app", "service"),
    "batch": ("service.commands.batch", "app", "batch"),
    "doctor": ("service.commands.doctor", "app", "service"),
    "loadtest": ("loadtest.commands", "app", "loadtest"),
}


class _Lazy(MutableMapping[str, Any]):
    """The commands by name; a lookup imports the command."""

    def __getitem__(self, name: str) -> Any:
        module, attribute, extra = COMMANDS[name]
        try:
            app = getattr(import_module(module), attribute)
        except ModuleNotFoundError as error:
            if not (error.name and f"{module}.".startswith(f"{error.name}.")):
                raise
            app = _elsewhere(name, extra)
        found = get_command(app)
        found.name = name
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)

    def __setitem__(self, name: str, command: Any) -> None:
        raise TypeError("the commands are fixed by COMMANDS")

    def __delitem__(self, name: str) -> None:
        raise TypeError("the commands are fixed by COMMANDS")


def _elsewhere(name: str, extra: str) -> typer.Typer:
    """Make a placeholder for a command whose package is not installed."""
    app = group("")

    @app.command(
        name,
        help=f"Not installed: {CHECKOUT.format(extra)}.",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )
    def refuse() -> None:
        say(f"error: {name} is not part of this installation: {CHECKOUT.format(extra)}")
        raise typer.Exit(Exit.USAGE)

    return app


class _Commands(TyperGroup):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands = _Lazy()


app = group(
    "Answer questions from texts: serve a model, ask it, build and train it.", cls=_Commands, add_completion=True
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"bertqa {own_version()}")
        raise typer.Exit


def own_version() -> str:
    """Return the version of the installed package, or "checkout" if it is not installed."""
    try:
        return version("bertqa")
    except PackageNotFoundError:
        return "checkout"


@app.callback()
def bertqa(
    show: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Answer questions from texts: serve a model, ask it, build and train it."""


def main() -> None:
    """Run the command line and exit with its status."""
    get_command(app).main(prog_name="bertqa")
