"""Run one Triton server in the foreground: ``python -m service.runtime.triton``.

A container that has only Triton runs this.
"""

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from service.observability import logging as logs
from service.runtime.ports import LOOPBACK, TritonPorts
from service.runtime.triton_install import TritonError
from service.runtime.triton_process import EmbeddedTriton
from service.settings import Settings

log = logging.getLogger(logs.LAUNCHER)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m service.runtime.triton",
        description="Run one Triton server in the foreground and restart it when it dies. It logs to standard error.",
    )
    parser.add_argument(
        "--repository",
        type=Path,
        default=Path("model_repository"),
        help="model repository with the engine (default: %(default)s)",
    )
    parser.add_argument(
        "--host", default=LOOPBACK, help="IPv4 address to listen on; 0.0.0.0 for all (default: %(default)s)"
    )
    for name in ("grpc", "metrics", "http"):
        parser.add_argument(
            f"--{name}-port",
            type=int,
            default=getattr(TritonPorts, name),
            help="port to use, or the next free one (default: %(default)s)",
        )
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    """Run until a signal ends it; returns the exit code."""
    try:
        logs.configure(Settings.from_environment(os.environ))
    except ValueError as error:
        print(f"bertqa: error: {error}", file=sys.stderr)
        return 1
    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.set())
    triton = EmbeddedTriton(
        args.repository,
        host=args.host,
        ports=TritonPorts(args.grpc_port, args.metrics_port, args.http_port),
        log_dir=None,
        report=log.info,
    )
    try:
        triton.start(stopping)
        stopping.wait()
    except TritonError as error:
        log.error("error: %s", error)
        return 1
    finally:
        triton.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(parse_args()))
