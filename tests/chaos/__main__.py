"""``python -m tests.chaos``: run every scenario, print one table, and fail if anything was lost or wrong."""

import argparse
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.chaos import bad_input, corrupt_files, faults, hostile, overload, replicas, search, who_may_ask
from tests.chaos.faults import Scenario
from tests.chaos.product import Layout, Product
from tests.chaos.report import Row, Size, table

SCENARIOS: tuple[tuple[Layout, Scenario], ...] = (
    *faults.SCENARIOS,
    *replicas.SCENARIOS,
    *overload.SCENARIOS,
    *hostile.SCENARIOS,
)
OTHERS: tuple[Callable[[Size], Iterator[Row]], ...] = (
    bad_input.bad_input,
    who_may_ask.who_may_ask,
    corrupt_files.corrupt_files,
    hostile.hostile,
    search.searches,
)
"""Scenarios that need no running product: modules of this package and their functions, which return rows."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    size = Size()
    parser.add_argument(
        "--requests", type=int, default=size.requests, help="requests per fault, at least (%(default)s)"
    )
    parser.add_argument("--clients", type=int, default=size.clients, help="concurrent clients (%(default)s)")
    parser.add_argument("--inputs", type=int, default=size.inputs, help="generated bad inputs (%(default)s)")
    parser.add_argument(
        "--soak-minutes", type=float, default=size.soak_minutes, help="minutes of overload (%(default)s)"
    )
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="WORD", help="run only scenarios with one of these in their name"
    )
    return parser.parse_args(argv)


def rows(size: Size, only: Sequence[str]) -> Iterator[Row]:
    """Run the scenarios; those with the same layout share a product. A scenario that raises gets a row too."""
    chosen = [(layout, scenario) for layout, scenario in SCENARIOS if any(word in scenario.__name__ for word in only)]
    for layout in dict.fromkeys(layout for layout, _ in chosen):
        with (
            tempfile.TemporaryDirectory(prefix="bertqa-chaos-") as directory,
            Product(Path(directory), layout).running() as product,
        ):
            for scenario in (scenario for needed, scenario in chosen if needed == layout):
                try:
                    yield scenario(product, size)
                except Exception as error:
                    traceback.print_exc()
                    yield Row(fault=scenario.__name__, lost=1, problems=[f"failed: {error!r}"])
    for other in OTHERS:
        if any(word in other.__module__ for word in only):
            yield from other(size)


def main(args: argparse.Namespace) -> int:
    """Run the scenarios and return the exit code: 1 if any promise was broken."""
    size = Size(requests=args.requests, clients=args.clients, inputs=args.inputs, soak_minutes=args.soak_minutes)
    found = []
    for row in rows(size, args.only):
        found.append(row)
        print(f"{row.fault}: {'ok' if row.is_kept else 'BROKEN'}", file=sys.stderr, flush=True)
        for problem in row.problems:
            print(f"    {problem}", file=sys.stderr, flush=True)
    print(table(found))
    for note in (note for row in found for note in row.notes):
        print(f"- {note}")
    broken = [row.fault for row in found if not row.is_kept]
    print(
        f"\n{sum(row.requests for row in found):,} requests, {sum(row.injected for row in found):,} faults; broken: "
        f"{', '.join(broken) or 'none'}"
    )
    return 1 if broken or not found else 0


if __name__ == "__main__":
    sys.exit(main(parse_args()))
