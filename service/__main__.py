"""Entry of ``python -m service`` and ``bertqa serve``: reads the command line and launches."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from service.runtime.launcher import ServeOptions, launch


def parse_args(argv: Sequence[str] | None = None) -> ServeOptions:
    """Read the command line."""
    default = ServeOptions()
    parser = argparse.ArgumentParser(
        prog="bertqa serve", description="Serve a BERT question-answering model over REST."
    )
    parser.add_argument(
        "--host", default=default.host, help="address to listen on; 0.0.0.0 for all (default: %(default)s)"
    )
    parser.add_argument(
        "--port", type=int, default=default.port, help="port to listen on; 0 takes any free one (default: %(default)s)"
    )
    parser.add_argument(
        "--workers", type=int, default=default.workers, help="processes of the REST service (default: %(default)s)"
    )
    parser.add_argument(
        "--repository",
        type=Path,
        default=default.repository,
        help="Triton model repository with the engine (default: model_repository of the project)",
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="build the engine from this directory if the repository has none of it (default: any engine will do; if "
        "there is none, it is built from the one checkpoint in checkpoints/)",
    )
    parser.add_argument(
        "--triton-url",
        metavar="HOST:PORT",
        help="gRPC address of a running Triton, or several with commas (default: start one)",
    )
    parser.add_argument(
        "--triton-grpc-port",
        type=int,
        help="gRPC port of the Triton that is started; 0 takes any free one (default: 8001 or the next free one)",
    )
    parser.add_argument(
        "--log-dir", type=Path, default=default.log_dir, help="directory for Triton's log (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error("--workers: must be at least 1")
    for name in ("port", "triton_grpc_port"):
        if not 0 <= (getattr(args, name) or 0) <= 65535:
            parser.error(f"--{name.replace('_', '-')}: must be from 0 to 65535")
    return ServeOptions(**vars(args))


if __name__ == "__main__":
    sys.exit(launch(parse_args()))
