"""Build an engine, measure it, and publish it as a version of the model that Triton serves.

python -m engine_builder --checkpoint checkpoints/minilm-l6-squad --target cpu
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from bertqa.manifest import MODEL_NAME, BundleMismatch
from bertqa.repository import ChangeRefused
from bertqa.squad import MalformedSquad
from engine_builder.architectures import FAMILIES
from engine_builder.build import MAX_LOGIT_ERRORS, BuildOptions, build
from engine_builder.checkpoint import CALIBRATION_FILE, GATE_FILE, InvalidCheckpoint
from engine_builder.gate import GateFailed
from engine_builder.publish import BuildRefused
from engine_builder.targets import TARGETS
from engine_builder.targets.tensorrt import MAX_BATCH_SIZE, OPTIMIZATION_LEVELS


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m engine_builder", description="Build, measure and publish an engine for Triton."
    )
    _add_engine(parser)
    _add_publication(parser)
    _add_measurement(parser)
    _add_tensorrt(parser)
    _add_serving(parser)
    args = parser.parse_args(argv)
    for flag, value, least in (
        ("--instances", args.instances, 1),
        ("--threads", args.threads, 0),
        ("--max-batch-size", args.max_batch_size, 1),
    ):
        if value is not None and value < least:
            parser.error(f"{flag} must be at least {least}, not {value}")
    if args.max_batch_size > MAX_BATCH_SIZE:
        parser.error(f"--max-batch-size must be at most {MAX_BATCH_SIZE}, not {args.max_batch_size}")
    if args.version is not None and args.version < 1:
        parser.error(f"--version must be at least 1, not {args.version}")
    return args


def _add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR_OR_HUB_ID", help=f"question answering with {', '.join(FAMILIES)}"
    )
    parser.add_argument("--target", required=True, choices=TARGETS, help="what the engine runs on")
    parser.add_argument(
        "--precision",
        choices=list(dict.fromkeys(name for target in TARGETS.values() for name in target.precisions)),
        help="; ".join(
            f"{name}: {', '.join(target.precisions)} (default on this machine: {target.default_precision()})"
            for name, target in TARGETS.items()
        ),
    )


def _add_publication(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repository", type=Path, default=Path("model_repository"), help="default: %(default)s")
    parser.add_argument("--model", default=MODEL_NAME, metavar="NAME", help="of the repository; default: %(default)s")
    parser.add_argument("--version", type=int, metavar="N", help="version to publish; default: one above the latest")
    parser.add_argument(
        "--activate",
        action="store_true",
        help="answer with it at once; default: only if it is the model's first version, for `bertqa models` can check "
        "it before it switches",
    )


def _add_measurement(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gate-data", type=Path, metavar="SQUAD_JSON", help=f"questions to measure F1 on; default: {GATE_FILE} of DIR"
    )
    parser.add_argument(
        "--calibration-data",
        type=Path,
        metavar="SQUAD_JSON",
        help=f"questions to measure int8 and fp8 ranges on, other than the gate's; default: {CALIBRATION_FILE} of DIR",
    )
    parser.add_argument(
        "--max-f1-loss", type=float, default=0.5, help="percentage points below the float32 checkpoint; default: 0.5"
    )
    parser.add_argument(
        "--max-logit-error",
        type=float,
        help="distance from the float32 checkpoint's logits, as a share of their standard deviation; default: "
        + ", ".join(f"{limit} for {name}" for name, limit in MAX_LOGIT_ERRORS.items()),
    )
    parser.add_argument(
        "--max-batch-size",
        type=int,
        default=1,
        metavar="N",
        help="windows that Triton may put into one call; default: 1, for the least latency",
    )


def _add_tensorrt(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--optimization-level",
        type=int,
        choices=OPTIMIZATION_LEVELS,
        help="higher builds longer for a faster engine; default: TensorRT's own, 3",
    )
    parser.add_argument(
        "--timing-cache", type=Path, metavar="FILE", help="read if it is there, and written: makes the next build fast"
    )
    parser.add_argument(
        "--version-compatible",
        action="store_true",
        help="for later versions of TensorRT too; Triton then needs --backend-config=tensorrt,version-compatible=true",
    )
    parser.add_argument(
        "--hardware-compatible", action="store_true", help="for all GPUs from Ampere on, and slower on each"
    )


def _add_serving(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--instances", type=int, help="engines side by side; default: as it was, at first 2")
    parser.add_argument(
        "--threads", type=int, help="cores that each may use, 0 for all; default: as it was, at first 0"
    )
    parser.add_argument(
        "--gpus", type=_gpus, metavar="N,N", help="devices with so many engines each; default: as it was, at first all"
    )


def _gpus(text: str) -> tuple[int, ...]:
    numbers = text.split(",")
    if not all(number.isdecimal() for number in numbers) or len(set(numbers)) != len(numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of different numbers like 0,1")
    return tuple(map(int, numbers))


def main(args: argparse.Namespace) -> None:
    """Build; exits with the reason where it is refused."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a stopped build cleans up
    try:
        build(BuildOptions(**vars(args)))
    except (BuildRefused, ChangeRefused, InvalidCheckpoint, BundleMismatch, MalformedSquad, GateFailed) as error:
        sys.exit(f"engine_builder: {error}")


if __name__ == "__main__":
    main(parse_args())
