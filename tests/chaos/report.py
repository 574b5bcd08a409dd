"""The result of a scenario: a row of the table, and whether the promises were kept."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

READY_S = 2.0
"""Seconds within which every replica must be ready after the engine's return."""
GRACE_S = 1.0
"""Seconds beyond its deadline after which a request counts as lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """The size of each scenario."""

    requests: int = 2_000  # minimum
    clients: int = 32
    rounds: int = 3  # repeats of a process or connection fault
    inputs: int = 100_000  # generated bad inputs
    soak_minutes: float = 2.0
    patience: float = 1.0  # factor for all promised times; the tests allow a busy machine more


@dataclass(slots=True, kw_only=True)
class Row:
    """One fault, and what happened to the requests meanwhile."""

    fault: str
    requests: int = 0
    injected: int = 0  # number of faults, or of faulty inputs
    right: int = 0  # 200 with the known answer
    refused: Counter[str] = field(default_factory=Counter)  # counts, e.g. of "503 engine_unavailable"
    refusal: str = ""  # the latest message
    slowest_s: float = 0.0
    lost: int = 0  # no reply, too late, truncated, or an error not defined by the API
    wrong: int = 0  # 200 with another answer
    hung: int = 0  # no reply until the client gave up
    over: int = 0  # exceeded a limit on time, event-loop hold, bytes or memory
    ready_s: float | None = None  # longest time from the engine's return until every replica was ready
    leaked: str = ""  # tasks or file descriptors that remained
    problems: list[str] = field(default_factory=list)  # the first lost or wrong replies, and broken promises
    notes: list[str] = field(default_factory=list)  # remarks that are not problems

    @property
    def is_kept(self) -> bool:
        """Whether nothing was lost, wrong, hung, over its bounds or leaked, and no promise broken."""
        return not (self.lost or self.wrong or self.hung or self.over or self.leaked or self.problems)


_HEAD = (
    "fault",
    "requests",
    "faults",
    "right",
    "refused",
    "slowest s",
    "lost",
    "wrong",
    "hung",
    "over",
    "ready s",
    "leaked",
)


def table(rows: Iterable[Row]) -> str:
    """Format the rows as a Markdown table."""
    return "\n".join(_aligned([_HEAD, *map(_cells, rows)]))


def _cells(row: Row) -> tuple[str, ...]:
    refused = ", ".join(f"{count:,} × {what}" for what, count in row.refused.most_common()) or "0"
    ready = "" if row.ready_s is None else f"{row.ready_s:.2f}"
    counts = (f"{row.requests:,}", f"{row.injected:,}", f"{row.right:,}", refused, f"{row.slowest_s:.2f}")
    broken = (f"{row.lost:,}", f"{row.wrong:,}", f"{row.hung:,}", f"{row.over:,}")
    return (row.fault, *counts, *broken, ready, row.leaked or "0")


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
    return [text[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *text[1:]]
