"""Test the fair queue: its limit, its rounds, deadlines, and the reply to a rejected caller."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.inference.fair_queue import FairQueue


class Clockwork:
    """An engine with so many slots, whose calls end when they are told to."""

    def __init__(self, slots: int) -> None:
        self.queue = FairQueue(slots)
        self.begun: list[str] = []
        self.tasks: list[asyncio.Task[None]] = []
        self._ends: list[asyncio.Future[None]] = []

    def ask(self, name: str, windows: int, deadline_s: float = 60) -> None:
        """A request: as many workers as there are slots, as `Pipeline` has them."""
        todo, request = iter(range(windows)), object()

        async def work() -> None:
            for _ in todo:
                await self.queue.take(request, time.monotonic() + deadline_s)
                try:
                    end = asyncio.get_running_loop().create_future()
                    self.begun.append(name)
                    self._ends.append(end)
                    await end
                finally:
                    self.queue.give_back()

        self.tasks += [asyncio.ensure_future(work()) for _ in range(min(windows, self.queue.slots))]

    async def end_one(self) -> None:
        """End the call that began first, and let everyone act on it."""
        while (end := self._ends.pop(0)).done():
            pass
        end.set_result(None)
        await settle()

    @property
    def busy(self) -> int:
        return sum(not end.done() for end in self._ends)


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def play(scenario: Callable[[], Coroutine[None, None, None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_turns_go_round_the_requests() -> None:
    async def scenario() -> None:
        engine = Clockwork(2)
        engine.ask("long", 100)
        await settle()
        engine.ask("short", 1)
        engine.ask("other", 4)
        await settle()
        for _ in range(7):
            await engine.end_one()
        assert engine.begun == ["long", "long", "short", "other", "long", "other", "long", "other", "long"]
        for task in engine.tasks:
            task.cancel()

    play(scenario)


def test_a_deadline_ends_the_wait_and_leaves_nothing() -> None:
    async def scenario() -> None:
        turns = FairQueue(1)
        await turns.take("first", time.monotonic())
        for passed in (0.01, -1):
            with pytest.raises(TimeoutError):
                await turns.take("late", time.monotonic() + passed)
        assert not turns._waiting
        turns.give_back()
        await turns.take("next", time.monotonic())

    play(scenario)


def test_a_turn_that_came_leaves_no_timer_behind() -> None:
    async def scenario() -> None:
        turns = FairQueue(1)
        await turns.take("first", time.monotonic() + 3600)
        waiting = asyncio.ensure_future(turns.take("next", time.monotonic() + 3600))
        await settle()
        kept: Any = asyncio.get_running_loop()
        timers = [timer for timer in kept._scheduled if timer.when() > kept.time() + 600]
        assert len(timers) == 1
        turns.give_back()
        await waiting
        assert timers[0].cancelled()

    play(scenario)


def test_a_turn_that_comes_with_the_cancellation_is_passed_on() -> None:
    async def scenario() -> None:
        turns = FairQueue(1)
        await turns.take("first", time.monotonic())
        gone, heir = (asyncio.ensure_future(turns.take(name, time.monotonic() + 60)) for name in ("gone", "heir"))
        await settle()
        turns.give_back()  # to the one that is cancelled before it can run
        gone.cancel()
        await asyncio.wait([gone])
        await asyncio.wait_for(heir, 1)

    play(scenario)


def test_more_and_fewer_slots() -> None:
    async def scenario() -> None:
        engine = Clockwork(1)
        for name in "abcdef":
            engine.ask(name, 1)
        await settle()
        engine.queue.resize(3)
        await settle()
        assert engine.busy == 3
        engine.queue.resize(1)
        await engine.end_one()
        await engine.end_one()
        assert engine.busy == 1
        await engine.end_one()
        assert engine.busy == 1
        while engine.busy:
            await engine.end_one()
        assert engine.begun == list("abcdef")
        assert engine.queue.busy == 0

    play(scenario)


@given(
    st.integers(1, 4),
    st.lists(st.one_of(st.integers(1, 9), st.sampled_from(["end", "cancel"]), st.integers(-4, -1)), max_size=40),
)
def test_no_slot_is_lost_and_none_idles_while_someone_waits(slots: int, story: list[object]) -> None:
    """Numbers above 0 are requests of so many windows, below 0 other numbers of slots."""

    async def scenario() -> None:
        engine = Clockwork(slots)
        for event in story:
            if event == "end":
                if engine.busy:
                    await engine.end_one()
            elif event == "cancel":
                for task in engine.tasks[::3]:
                    task.cancel()
            elif isinstance(event, int) and event > 0:
                engine.ask(f"{len(engine.tasks)}", event)
            elif isinstance(event, int):
                engine.queue.resize(-event)
            await settle()
            turns = engine.queue
            assert engine.busy == turns.busy
            assert turns.busy >= turns.slots or not turns._waiting
            assert all(turns._waiting.values())
        for task in engine.tasks:
            task.cancel()
        await settle()
        assert engine.queue.busy == 0
        assert not engine.queue._waiting

    play(scenario)
