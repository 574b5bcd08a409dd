"""Test the real admission in an event loop whose clock jumps to the next event.

The engine has two instances at 300 ms per call, and Triton has one more call queued for each, as on two CPU cores.
"""

import asyncio
import math
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from service.inference.admission import Admission, Call
from service.triton.errors import EngineOverloaded, EngineTimeout

INSTANCES, SLOTS = 2, 4
CALL_S = 0.3
CAPACITY = INSTANCES / CALL_S
MAX_WAIT_S = 2.0


class JumpingLoop(asyncio.SelectorEventLoop):
    """An event loop that never waits: where nothing is to be done now, it is the time of the next timer at once."""

    now = 1000.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self.now = max(self.now, self._scheduled[0].when())  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


Play = Callable[[Callable[[], Coroutine[Any, Any, None]]], None]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Play:
    def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
        loop = JumpingLoop()
        for module in ("admission", "fair_queue"):
            monkeypatch.setattr(f"service.inference.{module}.time.monotonic", loop.time)
        try:
            loop.run_until_complete(scenario())
        finally:
            loop.close()

    return run


@dataclass
class Client:
    """What became of one client's calls."""

    seconds: list[float] = field(default_factory=list)  # of calls that were answered
    answered: list[int] = field(default_factory=list)  # questions of each
    refused: int = 0
    retry_after_s: list[float] = field(default_factory=list)
    in_vain: list[float] = field(default_factory=list)  # seconds until each refusal
    late: int = 0


class Product:
    """Admission before an engine; a call begins as `Pipeline` lets it."""

    def __init__(self, *, slots: int = SLOTS, spread: float = 0.0) -> None:
        self.admission = Admission(MAX_WAIT_S, slots)
        self.engine = asyncio.Semaphore(INSTANCES)
        self.random = random.Random(0)
        self.spread = spread

    async def ask(self, client: Client, windows: int = 1, deadline_s: float = 10.0) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        call = Call(began + deadline_s)
        try:
            self.admission.check(call.deadline)
            with self.admission.arriving():
                await asyncio.sleep(0.001)  # tokenizing
            todo = iter(range(windows))

            async def work() -> None:
                for _ in todo:
                    async with self.admission.slot(call), self.engine:
                        await asyncio.sleep(CALL_S * self.random.uniform(1 - self.spread, 1 + self.spread))

            await asyncio.gather(*(work() for _ in range(min(windows, self.admission.slots))))
        except EngineOverloaded as error:
            client.refused += 1
            client.in_vain.append(loop.time() - began)
            client.retry_after_s.append(error.retry_after_s)
            await asyncio.sleep(0.05)  # it does not wait as it was told to
        except EngineTimeout:
            client.late += 1
        else:
            client.seconds.append(loop.time() - began)
            client.answered.append(windows)

    async def closed_loop(self, clients: int, seconds: float, windows: int = 1) -> Client:
        """So many clients who ask again at once, for so long."""
        all_of_them, loop = Client(), asyncio.get_running_loop()
        end = loop.time() + seconds

        async def client() -> None:
            await asyncio.sleep(self.random.random())
            while loop.time() < end:
                await self.ask(all_of_them, windows)

        await asyncio.gather(*(client() for _ in range(clients)))
        return all_of_them


@pytest.mark.parametrize("spread", [0.0, 0.5])
def test_eight_clients_of_a_slow_engine_are_never_refused(play: Play, spread: float) -> None:
    async def scenario() -> None:
        found = await Product(spread=spread).closed_loop(8, 160)
        assert len(found.seconds) >= 1000
        assert (found.refused, found.late) == (0, 0)

    play(scenario)


@pytest.mark.parametrize("spread", [0.0, 0.5])
def test_ten_times_the_capacity_costs_neither_throughput_nor_more_than_the_bound(play: Play, spread: float) -> None:
    async def scenario() -> None:
        peak = len((await Product(spread=spread).closed_loop(8, 100)).seconds) / 100
        assert peak == pytest.approx(CAPACITY, rel=0.03)
        product, crowd, tasks = Product(spread=spread), Client(), []
        await product.closed_loop(8, 5)  # so that the time of a call is known
        for _ in range(int(100 * 10 * CAPACITY)):
            tasks.append(asyncio.ensure_future(product.ask(crowd)))
            await asyncio.sleep(product.random.expovariate(10 * CAPACITY))
        await asyncio.wait(tasks)
        for over in (await Product(spread=spread).closed_loop(64, 100), crowd):
            assert over.refused > 0
            assert len(over.seconds) / 100 >= 0.95 * peak
            assert np.percentile(over.seconds, 99) <= MAX_WAIT_S + 2 * CALL_S * (1 + spread) + 0.01
            in_vain = sum(each > 0 for each in over.in_vain)
            assert in_vain <= 0.05 * len(over.seconds), "refused after they had waited"
            assert over.late == 0

    play(scenario)


def test_a_client_of_single_questions_gets_its_share_beside_calls_of_64(play: Play) -> None:
    async def scenario() -> None:
        product = Product()
        many, one = await asyncio.gather(product.closed_loop(1, 100, windows=32), product.closed_loop(1, 100))
        assert (one.refused, one.late) == (0, 0)
        # It asks one question at a time: a turn of each other call, and its own engine call behind those in Triton.
        assert max(one.seconds) <= 4 * CALL_S
        assert len(one.seconds) >= 100 / (4 * CALL_S)
        assert sum(many.answered) >= 0.5 * CAPACITY * 100, "the engine is not left idle"

    play(scenario)


def test_a_refusal_says_truly_when_to_come_again(play: Play) -> None:
    async def scenario() -> None:
        product, crowd = Product(), Client()
        await product.closed_loop(8, 5)  # so that the time of a call is known
        tasks = [asyncio.ensure_future(product.ask(crowd)) for _ in range(40)]
        await asyncio.sleep(0.01)
        with pytest.raises(EngineOverloaded, match=r"the limit is 2\.00 s") as refused:
            product.admission.check()
        late = Client()
        await asyncio.sleep(max(math.ceil(refused.value.retry_after_s), 1))  # as the header says
        await product.ask(late)
        assert late.refused == 0
        assert late.seconds[0] <= MAX_WAIT_S + 2 * CALL_S + 0.01
        await asyncio.wait(tasks)
        # Whose deadline is nearer than the bound may wait no longer than that.
        tasks = [asyncio.ensure_future(product.ask(Client())) for _ in range(10)]
        await asyncio.sleep(0.01)
        product.admission.check(asyncio.get_running_loop().time() + 2)
        with pytest.raises(EngineOverloaded, match=r"the limit is 0\.50 s"):
            product.admission.check(asyncio.get_running_loop().time() + 0.5)
        await asyncio.wait(tasks)

    play(scenario)


def test_calls_being_tokenized_and_work_that_cannot_be_stopped_count(play: Play) -> None:
    async def scenario() -> None:
        admission = Admission(MAX_WAIT_S, 1)
        async with admission.slot(Call(2000.0)):
            await asyncio.sleep(1.0)
        assert admission.expected_wait() == 0
        with admission.arriving(), admission.arriving():
            assert admission.expected_wait() == pytest.approx(2.0)
            assert admission.expected_wait(besides=3) == pytest.approx(5.0)
            async with admission.slot(Call(2000.0)):
                assert admission.expected_wait() == pytest.approx(3.0)
        assert admission.expected_wait() == 0

    play(scenario)


def test_an_engine_that_stops_costs_nobody_more_than_the_bound(play: Play) -> None:
    async def scenario() -> None:
        loop, admission = asyncio.get_running_loop(), Admission(MAX_WAIT_S, 1)
        async with admission.slot(Call(5000.0)):
            await asyncio.sleep(CALL_S)
        async with admission.slot(Call(5000.0)):  # which never ends
            began = loop.time()
            with pytest.raises(EngineOverloaded, match="The engine became slower"):
                async with admission.slot(Call(5000.0)):
                    pass
            assert loop.time() - began == pytest.approx(MAX_WAIT_S)
            with pytest.raises(EngineTimeout, match="deadline"):
                async with admission.slot(Call(loop.time() + 1)):
                    pass
            begun = Call(loop.time() + 8, has_begun=True)
            with pytest.raises(EngineTimeout, match="deadline"):
                async with admission.slot(begun):
                    pass
            assert loop.time() == pytest.approx(begun.deadline)

    play(scenario)


def test_slots_follow_the_engine_unless_they_are_set() -> None:
    free, fixed = Admission(1.0), Admission(1.0, 7)
    for each in (free, fixed):
        each.resize(12)
    assert (free.slots, fixed.slots) == (12, 7)
