"""``bertqa models``: put another version of a model into service, and take it back."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from bertqa.manifest import BundleMismatch
from bertqa.repository import ChangeRefused, Repository
from service.commands.rollout import Rollout
from service.commands.triton_admin import RolloutFailed, Servers, tls_of
from service.settings import Settings

PROJECT = Path(__file__).resolve().parents[2]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    settings = Settings.from_environment({"BERTQA_REPOSITORY": str(PROJECT / "model_repository"), **os.environ})
    parser = argparse.ArgumentParser(
        prog="bertqa models", description="Put another version of a model into service, and take it back."
    )
    steps = parser.add_subparsers(dest="step", required=True, metavar="STEP")
    for name, text in (
        ("list", "the versions of every model"),
        ("load", "load a version beside those that answer, and check it"),
        ("check", "ask a loaded version the questions that it answered when it was built"),
        ("switch", "check a loaded version and let it answer"),
        ("rollback", "let the version answer that did before"),
        ("unload", "drop a version that nobody asks any more from memory"),
    ):
        step = steps.add_parser(name, help=text, description=text)
        if name != "list":
            step.add_argument("model", help="name of the model")
        if name in ("load", "check", "switch", "unload"):
            step.add_argument("version", type=int)
        if name in ("switch", "rollback"):
            step.add_argument("--unchecked", action="store_true", help="without asking it anything first")
        if name == "unload":
            step.add_argument("--force", action="store_true", help="even while it is being asked")
        step.add_argument(
            "--repository", type=Path, default=settings.repository, help="model repository (default: %(default)s)"
        )
        step.add_argument(
            "--triton-url",
            default=settings.triton_url,
            metavar="HOST:PORT",
            help="gRPC address of Triton, or of all of them with commas; a name stands for all its addresses "
            "(default: %(default)s)",
        )
        step.add_argument("--timeout", type=float, default=300.0, help="seconds to wait for Triton (default: 300)")
        step.set_defaults(settings=settings)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    """Take the step; returns the process's exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a load that is stopped is taken back
    try:
        servers = Servers([url.strip() for url in args.triton_url.split(",")], tls_of(args.settings))
        try:
            _take(args, Rollout(Repository(args.repository), servers, timeout_s=args.timeout, report=_say))
        finally:
            servers.close()
    except (RolloutFailed, ChangeRefused, BundleMismatch) as error:
        _say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _take(args: argparse.Namespace, rollout: Rollout) -> None:
    match args.step:
        case "list":
            rows = rollout.rows()
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            for row in rows:
                print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        case "load":
            rollout.load(args.model, args.version)
        case "check":
            rollout.check(args.model, args.version)
        case "switch":
            rollout.switch(args.model, args.version, unchecked=args.unchecked)
        case "rollback":
            rollout.rollback(args.model, unchecked=args.unchecked)
        case "unload":
            rollout.unload(args.model, args.version, force=args.force)


def _say(line: str) -> None:
    print(f"bertqa: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(parse_args()))
