"""Entry of ``python -m service`` and ``bertqa serve``."""

import sys

from service.runtime.launcher import main, parse_args

if __name__ == "__main__":
    sys.exit(main(parse_args()))
