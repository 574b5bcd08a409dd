"""What the measurement of admission tells of a service whose engine sleeps, and of one that turns everybody away."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from loadtest.measure_admission import Admission, Goal, Outcome
from tests.chaos.toy_service import INSTANCES, toy_service

CALL_S = 0.05
QUESTIONS = [{"question": f"Who made number {number}?", "context": "It was made at Uber."} for number in range(8)]


@contextmanager
def measured(directory: Path, max_wait_s: float) -> Iterator[Admission]:
    """Of a service with that bound on waiting."""
    settings = {"max_wait_s": max_wait_s}
    with toy_service(directory / "log", settings, call_s=CALL_S) as ((host, port), _):
        yield Admission(host, port, QUESTIONS, call_s=CALL_S, instances=INSTANCES, max_wait_s=max_wait_s)


async def outcomes(admission: Admission) -> tuple[Outcome, list[Outcome], Outcome]:
    few = await admission.few(64)
    crowds = [await admission.crowd(few.rate, 2.0), await admission.rude(1.0)]
    single, others = await admission.beside(1.0, 1)
    assert others.answered
    return few, crowds, single


@pytest.mark.slow
def test_the_goals_are_met_by_the_service(tmp_path: Path) -> None:
    with measured(tmp_path, 0.5) as admission:
        few, crowds, single = asyncio.run(outcomes(admission))
        goals = admission.goals(few, crowds, single, slack=3.0)
    assert all(goal.is_met for goal in goals), list(map(str, goals))
    assert len(few.answered) == 64
    assert all(crowd.refused for crowd in crowds), "they are too many"
    assert single.row().count("|") == 9


def test_a_service_that_turns_its_users_away_meets_no_goal_on_refusals(tmp_path: Path) -> None:
    with measured(tmp_path, 0.01) as admission:
        few = asyncio.run(admission.few(64))
        (goal,) = (each for each in admission.goals(few, [few], few) if "of 64 refused" in each.text)
    assert few.refused > 0
    assert not goal.is_met
    assert str(goal).startswith("- NOT MET: 8, without pause")
    assert str(Goal("all is well", is_met=True)) == "- met: all is well"
