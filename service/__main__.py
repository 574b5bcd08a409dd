"""Run ``bertqa serve`` as ``python -m service``."""

from bertqa.cli.command import run
from service.commands.serve import app

if __name__ == "__main__":
    run(app, "bertqa serve")
