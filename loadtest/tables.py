"""Markdown tables: what every measurement prints."""

from collections.abc import Iterable, Mapping, Sequence


def heading(names: Sequence[str], *, texts: int = 1) -> str:
    """The first two lines of a table; columns after the first ``texts`` hold numbers, aligned right."""
    return f"{row(names)}\n|{'---|' * texts}{'---:|' * (len(names) - texts)}"


def row(cells: Iterable[object]) -> str:
    """One line of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def markdown(rows: Sequence[Mapping[str, object]]) -> str:
    """A table of rows with the same columns, all of them numbers; empty without rows."""
    if not rows:
        return ""
    return "\n".join([heading(list(rows[0]), texts=0), *(row(each.values()) for each in rows)]) + "\n"
