"""``python -m training.data``, which is ``bertqa train data``."""

from bertqa.cli.command import run
from training.data.commands import app

if __name__ == "__main__":
    run(app, "python -m training.data")
