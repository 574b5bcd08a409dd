"""The ``bertqa`` command: finds the commands of every package, and imports only the one that is asked for.

Commands live beside what they run, in light modules that need Typer alone. A package that is not there, because only
``bertqa`` was installed and not a checkout, leaves its commands in the list and says how to get them.
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

from bertqa.command import CHECKOUT, Exit, group, say

COMMANDS = {  # name: (module, its Typer application, the extra that its package needs)
    "serve": ("service.commands.serve", "app", "service"),
    "ask": ("bertqa.commands", "ask_app", "cli"),
    "evaluate": ("bertqa.commands", "evaluate_app", "cli"),
    "build": ("engine_builder.commands", "app", "builder"),
    "train": ("training.commands", "app", "training"),
    "models": ("service.commands.models", "app", "service"),
    "keys": ("service.commands.keys", "app", "service"),
    "batch": ("service.commands.batch", "app", "batch"),
    "doctor": ("service.commands.doctor", "app", "service"),
    "loadtest": ("loadtest.commands", "app", "loadtest"),
}


class _Lazy(MutableMapping[str, Any]):
    """The commands by name, each imported when it is looked up."""

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
        raise TypeError("commands are those of COMMANDS")

    def __delitem__(self, name: str) -> None:
        raise TypeError("commands are those of COMMANDS")


def _elsewhere(name: str, extra: str) -> typer.Typer:
    """A command in the place of one whose package is not here."""
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
    """Version of bertqa, or a word for a checkout that is not installed."""
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


if __name__ == "__main__":
    main()
