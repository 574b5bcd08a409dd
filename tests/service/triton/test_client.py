"""The engine client, against a real Triton with a model that misbehaves and against a fake one."""

import asyncio
from typing import Any

import pytest
from tritonclient.grpc import service_pb2

from bertqa.spans import Logits
from bertqa.windows import INPUT_NAMES, OUTPUT_NAMES
from service.runtime.triton_process import EmbeddedTriton
from service.triton.channels import Channels
from service.triton.client import TritonEngine
from service.triton.errors import EngineBroken, EngineOverloaded, EngineTimeout, EngineUnavailable
from tests.support.fake_triton import FakeTriton, ask_fake, reply
from tests.support.toy_triton import (
    NAN,
    RAISE,
    SHAPE,
    SLEEP,
    assert_right,
    run,
    soon,
    until_answered,
    window,
    with_channels,
)


@pytest.mark.triton
def test_many_windows_of_several_requests_side_by_side(server: EmbeddedTriton) -> None:
    requests = [[window(length=length, seed=seed) for length in (64, 128, 384)] for seed in range(4)]

    async def scenario(model: TritonEngine) -> list[list[Logits]]:
        return await asyncio.gather(*(model.predict(windows, deadline=soon()) for windows in requests))

    for windows, logits in zip(requests, run(server.url, scenario), strict=True):
        assert_right(windows, logits)


def test_no_window_needs_no_engine() -> None:
    assert run("127.0.0.1:1", lambda model: model.predict([], deadline=soon())) == []


@pytest.mark.triton
@pytest.mark.alone
def test_deadline_passes_while_the_engine_computes_and_while_a_window_waits(server: EmbeddedTriton) -> None:
    async def scenario(model: TritonEngine) -> None:
        slow = asyncio.create_task(model.predict([window(SLEEP, 1500)], deadline=soon()))
        await asyncio.sleep(0.3)
        with pytest.raises(EngineTimeout, match="before the engine answered"):
            await model.predict([window()], deadline=soon(0.3))
        with pytest.raises(EngineTimeout, match="deadline"):
            await model.predict([window()] * 10, deadline=soon(0.3))
        assert not slow.done()
        await slow
        with pytest.raises(EngineTimeout):
            await model.predict([window()], deadline=soon(-1))
        assert_right([window()], await model.predict([window()], deadline=soon()))

    run(server.url, scenario)


@pytest.mark.triton
def test_one_window_failing_cancels_the_others(server: EmbeddedTriton) -> None:
    async def scenario(model: TritonEngine) -> None:
        with pytest.raises(EngineBroken, match="no such bucket"):
            await model.predict([window(RAISE), *[window(SLEEP, 100)] * 10], deadline=soon())
        assert_right([window()], await model.predict([window()], deadline=soon()))

    run(server.url, scenario)


@pytest.mark.triton
def test_cancelling_the_caller_ends_its_calls(server: EmbeddedTriton) -> None:
    async def scenario(model: TritonEngine) -> None:
        requests = [asyncio.create_task(model.predict([window(SLEEP, 200)] * 2, deadline=soon())) for _ in range(3)]
        await asyncio.sleep(0.3)
        for request in requests:
            request.cancel()
        await asyncio.wait(requests)
        assert all(request.cancelled() for request in requests)
        # Triton's queue has room for these even while the cancelled ones are in it.
        assert_right([window()] * 8, await model.predict([window()] * 8, deadline=soon()))

    run(server.url, scenario)


@pytest.mark.triton
def test_full_queue_of_triton_is_overload(server: EmbeddedTriton) -> None:
    async def scenario(model: TritonEngine) -> None:
        with pytest.raises(EngineOverloaded, match="queue"):
            await model.predict([window(SLEEP, 300)] * 40, deadline=soon())
        await until_answered(model)  # Triton drops the cancelled ones when the running one has ended

    run(server.url, scenario)


@pytest.mark.triton
def test_nan_is_broken(server: EmbeddedTriton) -> None:
    with pytest.raises(EngineBroken, match="'start_logits' holds NaN"):
        run(server.url, lambda model: model.predict([window(NAN)], deadline=soon()))


@pytest.mark.triton
def test_wrong_shape_is_broken(server: EmbeddedTriton) -> None:
    with pytest.raises(EngineBroken, match=r"'end_logits' is not FP32 \[1, 64\]: FP32 \[1, 63\] in 252 bytes"):
        run(server.url, lambda model: model.predict([window(SHAPE)], deadline=soon()))


@pytest.mark.triton
def test_what_is_not_there_is_unavailable(server: EmbeddedTriton) -> None:
    async def asked(channels: Channels) -> None:
        with pytest.raises(EngineUnavailable, match="bert_de"):
            await channels.admin("bert_de").check_ready(deadline=soon())
        with pytest.raises(EngineUnavailable, match="bert_de"):
            await channels.engine("bert_de").predict([window()], deadline=soon())

    async def unconnected(model: TritonEngine) -> None:
        with pytest.raises(EngineUnavailable, match=r"No connection to Triton at 127\.0\.0\.1:1"):
            await model.predict([window()] * 3, deadline=soon())

    async def closed(channels: Channels) -> None:
        await channels.close()
        with pytest.raises(EngineUnavailable, match="closed"):
            await channels.engine().predict([window()], deadline=soon())

    with_channels(server.url, asked)
    run("127.0.0.1:1", unconnected)
    with_channels(server.url, closed)


def test_request_carries_id_deadline_and_raw_tensors() -> None:
    fake = FakeTriton(2, reply(*reversed(OUTPUT_NAMES)))
    [(start, end)] = ask_fake(fake)
    assert start.shape == end.shape == (1, 64)
    assert len(fake.requests) == 3  # two refusals, two more attempts
    request, remaining = fake.requests[-1]
    assert request.id == "r-17"
    assert 0 < request.parameters["timeout"].int64_param <= 5_000_000
    assert remaining is None  # gRPC is told no deadline, for it keeps one by the wall clock
    assert [tensor.name for tensor in request.inputs] == list(INPUT_NAMES)
    assert list(request.raw_input_contents) == [tensor.tobytes() for tensor in window().tensors().values()]
    assert [tensor.name for tensor in request.outputs] == list(OUTPUT_NAMES)


@pytest.mark.parametrize(
    ("answer", "problem"),
    [(reply("start_logits"), "no output 'end_logits'"), (service_pb2.ModelInferResponse(outputs=[{}]), "raw tensors")],
)
def test_incomplete_answer_is_broken(answer: Any, problem: str) -> None:
    with pytest.raises(EngineBroken, match=problem):
        ask_fake(FakeTriton(0, answer))
