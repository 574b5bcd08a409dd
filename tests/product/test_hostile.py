"""Requests that once held the service up, against a running server, and a search for others; in small numbers."""

import dataclasses
from collections.abc import Iterator

import pytest

from tests.chaos import hostile
from tests.chaos.hostile import Reproduction, Server
from tests.chaos.report import Size, table
from tests.chaos.search import search

SMALL = Size(requests=200, inputs=750, patience=10.0)
"""A busy machine may take longer than promised, but not for ever."""


@pytest.fixture(scope="module")
def quick() -> Iterator[Server]:
    """One whose engine takes no time."""
    with hostile.serving(0.0) as server:
        yield server


@pytest.fixture(scope="module")
def slow() -> Iterator[Server]:
    """One whose engine is what everybody waits for."""
    with hostile.serving(hostile.CALL_S) as server:
        yield server


@pytest.mark.parametrize("reproduce", hostile.QUICK)
def test_nobodys_request_stops_the_service(quick: Server, reproduce: Reproduction) -> None:
    check(quick, reproduce)


@pytest.mark.parametrize("reproduce", hostile.SLOW)
def test_nobody_is_turned_away_for_nothing(slow: Server, reproduce: Reproduction) -> None:
    check(slow, reproduce)


def check(server: Server, reproduce: Reproduction) -> None:
    row = reproduce(server, SMALL)
    print(table([row]), *row.notes, sep="\n")
    assert row.is_kept, row.problems
    assert row.injected
    assert row.right


@pytest.mark.slow
@pytest.mark.alone
def test_no_request_that_is_searched_for_costs_more_than_it_may() -> None:
    row = search(SMALL, 0)
    print(table([row]), *row.notes, sep="\n")
    assert row.is_kept, row.problems
    assert row.right


@pytest.mark.slow
@pytest.mark.alone
def test_the_search_finds_a_hold_that_was_planted() -> None:
    row = search(dataclasses.replace(SMALL, inputs=500), 0, planted_s=1.0)
    assert row.over
    assert "event loop held for" in row.problems[0]
    assert "worst by hold" in "\n".join(row.notes)
