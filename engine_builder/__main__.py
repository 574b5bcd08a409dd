"""Build an engine, measure it, and publish it as a version of the model that Triton serves.

python -m engine_builder --checkpoint checkpoints/minilm-l6-squad --target cpu
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from bertqa.manifest import MODEL_NAME, BundleMismatch, Target
from bertqa.repository import ChangeRefused
from bertqa.squad import MalformedSquad
from engine_builder.build import BuildOptions, build
from engine_builder.checkpoint import CALIBRATION_FILE, GATE_FILE, InvalidCheckpoint
from engine_builder.gate import GateFailed
from engine_builder.openvino_build import DEFAULT_PRECISION, PRECISIONS
from engine_builder.publish import BuildRefused


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m engine_builder", description="Build, measure and publish an engine for Triton."
    )
    parser.add_argument("--checkpoint", required=True, metavar="DIR_OR_HUB_ID", help="BERT for question answering")
    parser.add_argument("--target", required=True, choices=get_args(Target), help="what the engine runs on")
    parser.add_argument("--precision", choices=PRECISIONS, default=DEFAULT_PRECISION, help="default: %(default)s")
    # where it goes
    parser.add_argument("--repository", type=Path, default=Path("model_repository"), help="default: %(default)s")
    parser.add_argument("--model", default=MODEL_NAME, metavar="NAME", help="of the repository; default: %(default)s")
    parser.add_argument("--version", type=int, metavar="N", help="version to publish; default: one above the latest")
    parser.add_argument(
        "--activate",
        action="store_true",
        help="answer with it at once; default: only if it is the model's first version, for `bertqa models` can check "
        "it before it switches",
    )
    # what it is measured with
    parser.add_argument(
        "--gate-data", type=Path, metavar="SQUAD_JSON", help=f"questions to measure F1 on; default: {GATE_FILE} of DIR"
    )
    parser.add_argument(
        "--calibration-data",
        type=Path,
        metavar="SQUAD_JSON",
        help=f"questions to measure int8 ranges on, other than the gate's; default: {CALIBRATION_FILE} of DIR",
    )
    parser.add_argument(
        "--max-f1-loss", type=float, default=0.5, help="percentage points below the float32 checkpoint; default: 0.5"
    )
    # how it is served
    parser.add_argument("--instances", type=int, help="engines side by side; default: as it was, at first 2")
    parser.add_argument(
        "--threads", type=int, help="cores that each may use, 0 for all; default: as it was, at first 0"
    )
    args = parser.parse_args(argv)
    for flag, value, least in (("--instances", args.instances, 1), ("--threads", args.threads, 0)):
        if value is not None and value < least:
            parser.error(f"{flag} must be at least {least}, not {value}")
    if args.version is not None and args.version < 1:
        parser.error(f"--version must be at least 1, not {args.version}")
    return args


def main(args: argparse.Namespace) -> None:
    """Build; exits with the reason where it is refused."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a stopped build cleans up
    try:
        build(BuildOptions(**vars(args)))
    except (BuildRefused, ChangeRefused, InvalidCheckpoint, BundleMismatch, MalformedSquad, GateFailed) as error:
        sys.exit(f"engine_builder: {error}")


if __name__ == "__main__":
    main(parse_args())
