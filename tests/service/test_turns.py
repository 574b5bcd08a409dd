"""Turns at the engine: a bound, fair rounds, deadlines, and what a newcomer is told."""

import asyncio
import time
from collections.abc import Callable, Coroutine

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.turns import Turns


class Clockwork:
    """An engine with so many places, whose calls end when they are told to."""

    def __init__(self, places: int) -> None:
        self.turns = Turns(places)
        self.begun: list[str] = []
        self.tasks: list[asyncio.Task[None]] = []
        self._ends: list[asyncio.Future[None]] = []

    def ask(self, name: str, windows: int, deadline_s: float = 60) -> None:
        """A request: as many workers as there are places, as `TritonModel.predict` has them."""
        todo, request = iter(range(windows)), object()

        async def work() -> None:
            for _ in todo:
                await self.turns.take(request, time.monotonic() + deadline_s)
                try:
                    end = asyncio.get_running_loop().create_future()
                    self.begun.append(name)
                    self._ends.append(end)
                    await end
                finally:
                    self.turns.give_back(0.01)

        self.tasks += [asyncio.ensure_future(work()) for _ in range(min(windows, self.turns.places))]

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
        turns = Turns(1)
        await turns.take("first", time.monotonic())
        for passed in (0.01, -1):
            with pytest.raises(TimeoutError):
                await turns.take("late", time.monotonic() + passed)
        assert not turns._waiting
        turns.give_back()
        await turns.take("next", time.monotonic())

    play(scenario)


def test_a_turn_that_comes_with_the_cancellation_is_passed_on() -> None:
    async def scenario() -> None:
        turns = Turns(1)
        await turns.take("first", time.monotonic())
        gone, heir = (asyncio.ensure_future(turns.take(name, time.monotonic() + 60)) for name in ("gone", "heir"))
        await settle()
        turns.give_back()  # to the one that is cancelled before it can run
        gone.cancel()
        await asyncio.wait([gone])
        await asyncio.wait_for(heir, 1)

    play(scenario)


def test_a_newcomer_waits_for_the_places_that_must_become_free() -> None:
    turns = Turns(4)
    assert turns.expected_wait(1000) == 0, "nothing is known before the first call"
    turns.give_back(0.2)
    assert turns.call_s == 0.2
    assert [turns.expected_wait(ahead) for ahead in (0, 3, 4, 7, 11)] == pytest.approx([0, 0, 0.05, 0.2, 0.4])
    for _ in range(100):
        turns.give_back(0.4)
    assert turns.call_s == pytest.approx(0.4, rel=0.01)


def test_more_and_fewer_places() -> None:
    async def scenario() -> None:
        engine = Clockwork(1)
        for name in "abcdef":
            engine.ask(name, 1)
        await settle()
        engine.turns.resize(3)
        await settle()
        assert engine.busy == 3
        engine.turns.resize(1)
        await engine.end_one()
        await engine.end_one()
        assert engine.busy == 1
        await engine.end_one()
        assert engine.busy == 1
        while engine.busy:
            await engine.end_one()
        assert engine.begun == list("abcdef")
        assert engine.turns._free == 1

    play(scenario)


@given(
    st.integers(1, 4),
    st.lists(st.one_of(st.integers(1, 9), st.sampled_from(["end", "cancel"]), st.integers(-4, -1)), max_size=40),
)
def test_no_place_is_lost_and_none_idles_while_someone_waits(places: int, story: list[object]) -> None:
    """Numbers above 0 are requests of so many windows, below 0 other numbers of places."""

    async def scenario() -> None:
        engine = Clockwork(places)
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
                engine.turns.resize(-event)
            await settle()
            turns = engine.turns
            assert engine.busy == turns.places - turns._free
            assert turns._free <= 0 or not turns._waiting
            assert all(turns._waiting.values())
        for task in engine.tasks:
            task.cancel()
        await settle()
        assert engine.turns._free == engine.turns.places
        assert not engine.turns._waiting

    play(scenario)
