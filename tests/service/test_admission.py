"""Who is let in, simulated: the real rule and the real estimate of the wait, clients and engine of virtual time.

The engine has two instances, and Triton one more call ready for each, as on two cores of a CPU.
"""

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

import numpy as np
import pytest

from bertqa.manifest import Bundle
from service.metrics import Metrics
from service.models import Served
from service.triton import ModelOverloaded
from service.turns import Turns
from tests.support.toy_model import FakeEngine

INSTANCES, PLACES = 2, 4
CALL_S = (0.008, 0.032)
"""Seconds of an engine call, each as likely."""
CAPACITY = INSTANCES / np.mean(CALL_S)
LONGEST_S = 0.1


@dataclass
class Outcome:
    """What became of the questions of 50 s, after 10 s that do not count."""

    seconds: list[float] = field(default_factory=list)  # of those answered
    refused: int = 0

    @property
    def rate(self) -> float:
        return len(self.seconds) / 50

    @property
    def p99(self) -> float:
        return float(np.percentile(self.seconds, 99))

    @property
    def refused_share(self) -> float:
        return self.refused / (self.refused + len(self.seconds))


Simulate = Callable[..., Outcome]


@pytest.fixture
def simulate(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Simulate:
    def run(*, clients: int = 0, rate: float = 0.0) -> Outcome:
        clock, numbers, draw, outcome = [0.0], count(), random.Random(0), Outcome()
        monkeypatch.setattr("service.models.time.monotonic", lambda: clock[0])
        turns = Turns(PLACES)
        engine = FakeEngine(bundle.manifest.identity)
        engine.expected_wait = turns.expected_wait  # type: ignore[method-assign]
        served = Served(bundle, engine, Metrics())
        waiting: list[tuple[float, bool]] = []  # since when, and whether its client comes again
        ready: list[list[float | bool]] = []
        events: list[tuple[float, int, Callable[[], None]]] = []
        idle, free = INSTANCES, PLACES

        def at(moment: float, what: Callable[[], None]) -> None:
            heapq.heappush(events, (moment, next(numbers), what))

        def begin() -> None:
            nonlocal idle, free
            while free and waiting:
                asked, returns = waiting.pop(0)
                free -= 1
                ready.append([asked, clock[0], returns])
            while idle and ready:
                idle -= 1
                call = ready.pop(0)
                at(clock[0] + draw.uniform(*CALL_S), lambda call=call: end(*call))  # type: ignore[misc]

        def ask(returns: bool) -> None:
            try:
                served.check_room(LONGEST_S, patience_s=10)
            except ModelOverloaded:
                outcome.refused += clock[0] > 10
                if returns:
                    at(clock[0] + draw.uniform(1, 1.5), lambda: ask(True))  # as retry-after says
                return
            served.in_progress += 1
            waiting.append((clock[0], returns))
            begin()

        def end(asked: float, sent: float, returns: bool) -> None:
            nonlocal idle, free
            idle, free = idle + 1, free + 1
            served.in_progress -= 1
            turns.give_back(clock[0] - sent)
            engine.call_s = turns.call_s
            if clock[0] > 10:
                outcome.seconds.append(clock[0] - asked)
            if returns:
                at(clock[0], lambda: ask(True))
            begin()

        def arrive() -> None:
            ask(False)
            at(clock[0] + draw.expovariate(rate), arrive)

        for _ in range(clients):
            at(draw.random(), lambda: ask(True))
        if rate:
            at(0.0, arrive)
        while events[0][0] < 60:
            clock[0], _, what = heapq.heappop(events)
            what()
        return outcome

    return run


def test_ten_times_the_load_of_the_knee_costs_neither_throughput_nor_those_admitted_their_time(
    simulate: Simulate,
) -> None:
    knee = simulate(clients=PLACES)
    assert knee.rate == pytest.approx(CAPACITY, rel=0.03)
    assert knee.refused == 0
    for over in (simulate(clients=10 * PLACES), simulate(clients=100 * PLACES), simulate(rate=3 * CAPACITY)):
        assert over.refused_share > 0.15
        assert over.rate > 0.98 * knee.rate
        assert over.p99 < 2 * knee.p99


def test_a_load_below_the_capacity_is_hardly_refused(simulate: Simulate) -> None:
    assert simulate(rate=0.7 * CAPACITY).refused_share < 0.005
    assert simulate(rate=0.9 * CAPACITY).refused_share < 0.035
    assert simulate(clients=3 * PLACES).refused == 0, "as many as may wait for 100 ms"
