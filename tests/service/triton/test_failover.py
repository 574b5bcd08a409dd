"""Retries, replicas and circuits, against gRPC servers whose behaviour is set."""

import asyncio
import inspect
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any
from unittest.mock import Mock

import grpc.aio
import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bertqa.windows import OUTPUT_NAMES
from service.runtime.triton_process import EmbeddedTriton
from service.triton import replica
from service.triton.channels import Channels
from service.triton.client import TritonEngine
from service.triton.errors import EngineError, EngineTimeout, EngineUnavailable
from tests.support.fake_triton import FakeTriton, Moody, Watched, ask_fake, fail, reply, served
from tests.support.toy_triton import assert_right, run, soon, until_answered, window


@pytest.mark.triton
def test_a_dead_replica_is_passed_over(server: EmbeddedTriton) -> None:
    windows = [window(seed=seed) for seed in range(6)]
    assert_right(windows, run(f"127.0.0.1:1,{server.url}", lambda model: model.predict(windows, deadline=soon())))


def test_a_server_that_has_not_loaded_the_version_yet_is_passed_over() -> None:
    fake = FakeTriton(2, reply(*OUTPUT_NAMES))
    fake.refusal = grpc.StatusCode.NOT_FOUND, "Request for unknown model: 'bert_qa' version 2 is not found"
    assert len(ask_fake(fake)) == 1
    assert len(fake.requests) == 3


def test_lost_connection_is_retried_a_few_times_only(monkeypatch: pytest.MonkeyPatch) -> None:
    # Counted where they fail: on a busy machine, one of the three was once lost before it reached the fake.
    failed = Mock(wraps=replica.translate)
    monkeypatch.setattr(replica, "translate", failed)
    fake = FakeTriton(99, None)
    with pytest.raises(EngineUnavailable, match="Socket closed"):
        ask_fake(fake)
    assert failed.call_count == 3
    assert 0 < len(fake.requests) <= 3


@pytest.mark.parametrize("mood", ["shape", "nan", "garbage"])
def test_broken_engine_is_left_alone_and_taken_up_again(mood: str) -> None:
    async def scenario() -> None:
        fake, watched = Moody(), Watched()
        async with served(fake) as [url]:
            channels = Channels([url], watch_circuit=watched)
            model = channels.engine()
            fake.mood = mood
            said = await fail(model, 20)
            assert all(line.startswith("EngineBroken: ") for line in said[:5])
            assert all(line.startswith("EngineUnavailable: Triton failed several times") for line in said[5:]), said
            assert said[4].split(": ")[1] in said[5]  # and why, in our own words
            assert len(fake.requests) == 5
            fake.mood = "well"
            await until_answered(model)
            assert len(fake.requests) <= 7  # perhaps one trial that failed
            await channels.close()
        assert watched.states[url][:2] == ["closed", "open"]
        assert watched.states[url][-2:] == ["half_open", "closed"]

    asyncio.run(scenario())


def test_lost_engine_costs_no_retries_and_is_found_again() -> None:
    async def scenario() -> None:
        fake, watched = Moody(), Watched()
        async with served(fake) as [url]:
            channels = Channels([url], watch_circuit=watched)
            model = channels.engine()
            await model.predict([window()] * 4, deadline=soon(5))
        said = await fail(model, 3)
        assert watched.states[url][1] == "open"
        assert "No connection to Triton" in said[-1]
        begun = time.monotonic()
        said = await fail(model, 200)
        # Each used to wait 0.3 s for its retries, 60 s together.
        assert sum("calls pause for a moment" in line for line in said) > 190, (said, time.monotonic() - begun)
        with pytest.raises(EngineUnavailable):
            await channels.admin().check_ready(deadline=soon(1))
        async with served(fake, ports=(int(url.rpartition(":")[2]),)):
            await until_answered(model)
            # Whoever comes during the trial waits for its outcome: many windows at once are no obstacle.
            await model.predict([window()] * 16, deadline=soon(5))
            await channels.close()
        assert watched.states[url][-1] == "closed"

    asyncio.run(scenario())


@pytest.mark.alone
def test_request_of_many_windows_closes_the_circuit() -> None:
    async def scenario() -> None:
        fake, watched = Moody(), Watched()
        async with served(fake) as [url]:
            channels = Channels([url], watch_circuit=watched)
            model = channels.engine()
            fake.mood = "nan"
            await fail(model, 6)
            fake.mood = "slow"
            await asyncio.sleep(0.3)
            requests = [model.predict([window()] * 8, deadline=soon(5)) for _ in range(4)]
            assert [len(logits) for logits in await asyncio.gather(*requests)] == [8] * 4
            assert watched.states[url] == ["closed", "open", "half_open", "closed"]
            await channels.close()

    asyncio.run(scenario())


@pytest.mark.alone
@pytest.mark.parametrize("mood", ["shape", "nan", "garbage", "silent"])
def test_no_request_sees_a_broken_replica_beside_one_that_is_well(mood: str) -> None:
    async def scenario() -> None:
        broken, well, watched = Moody(), Moody(), Watched()
        async with served(broken, well) as urls:
            channels = Channels(urls, watch_circuit=watched)
            model = channels.engine()
            broken.mood = mood
            if mood == "silent":  # only the deadline tells, until the circuit is open
                for _ in range(5):
                    with pytest.raises(EngineTimeout):
                        await model.predict([window()], deadline=soon(0.6))
                    await model.predict([window()], deadline=soon(5))
            for _ in range(40):
                await model.predict([window()], deadline=soon(5))
            assert watched.states[urls[0]][:2] == ["closed", "open"]
            assert watched.states[urls[1]] == ["closed"]
            assert len(broken.requests) < 12
            broken.mood = "well"
            end = soon(15)
            while watched.states[urls[0]][-1] != "closed":
                assert time.monotonic() < end
                await model.predict([window()], deadline=soon(5))
                await asyncio.sleep(0.02)
            await channels.close()

    asyncio.run(scenario())


def test_short_deadlines_and_cancelled_calls_open_no_circuit() -> None:
    async def scenario() -> None:
        fake, watched = Moody(), Watched()
        async with served(fake) as [url]:
            channels = Channels([url], watch_circuit=watched)
            model = channels.engine()
            fake.mood = "slow"
            for _ in range(8):
                with pytest.raises(EngineTimeout):
                    await model.predict([window()], deadline=soon(0.05))
                task = asyncio.create_task(model.predict([window()] * 3, deadline=soon(5)))
                await asyncio.sleep(0.01)
                task.cancel()
                await asyncio.wait([task])
            assert watched.states[url] == ["closed"]
            await model.predict([window()], deadline=soon(5))
            await channels.close()

    asyncio.run(scenario())


class Replying(Moody):
    """Knows how many calls it has in progress, and each window by its first token."""

    def __init__(self, moods: Mapping[int, str] | None = None) -> None:
        super().__init__()
        self.moods = moods or {}
        self.in_progress = 0
        self.asked: Counter[int] = Counter()

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        number = int(np.frombuffer(request.raw_input_contents[0], np.int32)[0])
        self.asked[number] += 1
        self.mood = self.moods.get(number, self.mood)
        self.in_progress += 1
        try:
            if self.mood == "full":
                await context.abort(grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size")
            return await super().ModelInfer(request, context)
        finally:
            self.in_progress -= 1


async def no_call_is_left(*fakes: Replying) -> None:
    end = soon(15)
    while any(fake.in_progress for fake in fakes):
        assert time.monotonic() < end, [fake.in_progress for fake in fakes]
        await asyncio.sleep(0.01)


@hypothesis.settings(max_examples=15)
@given(
    st.lists(
        st.tuples(
            *[st.sampled_from(("well", "slow", "silent", "garbage", "nan", "full"))] * 2,
            st.sampled_from((0.03, 0.1, 0.3, 1.0)),  # the deadline, or when the caller goes away
            st.booleans(),
        ),
        min_size=1,
        max_size=40,
    )
)
def test_whatever_two_tritons_do_each_window_is_answered_once_and_no_call_is_left(
    fates: list[tuple[str, str, float, bool]],
) -> None:
    async def ask(model: TritonEngine, number: int, seconds: float, goes_away: bool) -> None:
        task = asyncio.ensure_future(model.predict([window(number)], deadline=soon(10 if goes_away else seconds)))
        await asyncio.wait([task], timeout=seconds if goes_away else None)
        if task.cancel():
            await asyncio.wait([task])
        elif not task.exception():
            assert_right([window(number)], task.result())
        else:
            assert isinstance(task.exception(), EngineError)

    async def scenario() -> None:
        moods = [{number: moods[side] for number, (*moods, _, _) in enumerate(fates)} for side in (0, 1)]
        fakes = [Replying(each) for each in moods]
        async with served(*fakes) as urls:
            channels = Channels(urls)
            model = channels.engine()
            await asyncio.gather(*(ask(model, number, *fate[2:]) for number, fate in enumerate(fates)))
            await no_call_is_left(*fakes)
            await channels.close()
            # gRPC's server, which the fakes run in, has tasks of its own that come and go; those are compiled.
            left = {task for task in asyncio.all_tasks() if inspect.iscoroutine(task.get_coro())}
            assert left == {asyncio.current_task()}

    asyncio.run(scenario())
