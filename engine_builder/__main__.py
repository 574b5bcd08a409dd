"""``python -m engine_builder``, which is ``bertqa build``."""

from bertqa.cli.command import run
from engine_builder.commands import app

if __name__ == "__main__":
    run(app, "python -m engine_builder")
