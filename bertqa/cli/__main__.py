"""``python -m bertqa.cli``."""

from bertqa.cli import main

main()
