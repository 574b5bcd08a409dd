"""The command line of ``bertqa doctor``: a line for each finding; exit code 1 if something fails, else 0."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from service.commands.doctor import DoctorOptions
from service.commands.doctor.diagnose import diagnose
from service.commands.doctor.finding import Level
from service.commands.models import PROJECT
from service.runtime.ports import LOOPBACK, TritonPorts
from service.settings import Settings


def parse_args(argv: Sequence[str] | None = None) -> DoctorOptions:
    """Read the command line."""
    settings = Settings.from_environment({"BERTQA_REPOSITORY": str(PROJECT / "model_repository"), **os.environ})
    parser = argparse.ArgumentParser(
        prog="bertqa doctor", description="Look for what would go wrong, and say how to fix it."
    )
    parser.add_argument(
        "--repository", type=Path, default=settings.repository, help="model repository (default: %(default)s)"
    )
    parser.add_argument(
        "--triton-url",
        metavar="HOST:PORT",
        help="gRPC address of a running Triton, or several with commas (default: one that `bertqa serve` would start)",
    )
    parser.add_argument("--host", default=LOOPBACK, help="that the service would listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="of the service (default: %(default)s)")
    parser.add_argument("--triton-grpc-port", type=int, default=TritonPorts.grpc, help="default: %(default)s")
    return DoctorOptions(**vars(parser.parse_args(argv)), settings=settings)


def main(options: DoctorOptions) -> int:
    """Print every finding as soon as it is there; 1 if something fails, else 0."""
    levels: set[Level] = set()
    for finding in diagnose(options):
        print(finding, flush=True)
        levels.add(finding.level)
    return int("FAIL" in levels)


if __name__ == "__main__":
    sys.exit(main(parse_args()))
