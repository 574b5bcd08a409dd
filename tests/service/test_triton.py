"""The engine's client and the embedded server, against a real Triton with a small model that misbehaves on request."""

import asyncio
import contextlib
import http.client
import inspect
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import Mock

import grpc.aio
import httpx
import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2, service_pb2_grpc

from bertqa.manifest import Bundle, Manifest
from bertqa.repository import Repository
from bertqa.spans import Logits
from bertqa.squad import Example, Reference, as_squad
from bertqa.windows import INPUT_NAMES, OUTPUT_NAMES, Window
from engine_builder.publish import NO_CACHE
from service.runtime import triton_install
from service.runtime.ports import TritonPorts, free_port
from service.runtime.triton_install import TritonError, find_triton
from service.runtime.triton_process import EmbeddedTriton
from service.settings import Settings
from service.triton import client as triton
from service.triton.circuit_breaker import FAILURES, Circuit, State
from service.triton.client import (
    Loaded,
    ModelBroken,
    ModelError,
    ModelOverloaded,
    ModelTimeout,
    ModelUnavailable,
    TritonModel,
    tls_credentials,
)
from tests.support.bundles import CONTEXT
from tests.support.certificates import certificates, tls_flags
from tests.support.checkpoints import write_checkpoint
from tests.support.name_server import Names
from tests.support.paths import ROOT
from tests.support.ports import triton_ports
from tests.support.repositories import publish_toy_bundle
from tests.support.triton_servers import triton_with
from tests.support.waiting import until

T = TypeVar("T")

SLEEP, NAN, SHAPE, RAISE, CRASH = range(60_001, 60_006)
"""First token of a window that makes the model do so; the second is its argument."""

MODEL = f"""
import ctypes
import os
import time
import numpy as np
import triton_python_backend_utils as triton

class TritonPythonModel:
    def initialize(self, args):
        if os.environ.get("TOY_MODEL_FAILS"):
            raise FileNotFoundError("engine.bin is not there")

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        ids, mask, types = (
            np.from_dlpack(triton.get_input_tensor_by_name(request, name)) for name in {INPUT_NAMES}
        )
        start = (ids + mask).astype(np.float32)
        end = (types - ids).astype(np.float32)
        match ids[0, 0]:
            case {SLEEP}:
                time.sleep(ids[0, 1] / 1000)
            case {NAN}:
                start[0, 5] = np.nan
            case {SHAPE}:
                end = np.ascontiguousarray(end[:, 1:])
            case {RAISE}:
                raise ValueError("no such bucket")
            case {CRASH}:
                os._exit(1)
        pairs = zip({OUTPUT_NAMES}, (start, end))
        return triton.InferenceResponse([self.tensor(name, value) for name, value in pairs])

    def tensor(self, name, value):  # as in the engine's own model.py, which says why
        capsule = value.__dlpack__()
        tensor = triton.Tensor.from_dlpack(name, capsule)
        ctypes.pythonapi.PyCapsule_SetName(ctypes.py_object(capsule), USED)
        return tensor

USED = b"used_dltensor"
"""


def config(identity: str) -> str:
    inputs = ", ".join(f'{{ name: "{name}" data_type: TYPE_INT32 dims: [ -1 ] }}' for name in INPUT_NAMES)
    outputs = ", ".join(f'{{ name: "{name}" data_type: TYPE_FP32 dims: [ -1 ] }}' for name in OUTPUT_NAMES)
    return f"""
        name: "bert_qa" backend: "python" max_batch_size: 1
        input [ {inputs} ] output [ {outputs} ]
        instance_group [ {{ count: 1 kind: KIND_CPU }} ]
        dynamic_batching {{ default_queue_policy {{
            timeout_action: REJECT default_timeout_microseconds: 20000000
            allow_timeout_override: true max_queue_size: 16
        }} }}
        parameters {{ key: "identity_1" value {{ string_value: "{identity}" }} }}
    """


def write_repository(directory: Path, identity: str = "toy") -> Path:
    version = directory / "bert_qa" / "1"
    version.mkdir(parents=True, exist_ok=True)
    (version / "model.py").write_text(MODEL)
    (version / NO_CACHE).write_text("so that Triton loads it once")
    (version.parent / "config.pbtxt").write_text(config(identity))
    return directory


def window(*first: int, length: int = 64, seed: int = 0) -> Window:
    rows = np.random.default_rng(seed).integers(0, 30_000, (3, 1, length), dtype=np.int32)
    rows[0, 0, : len(first)] = first
    ids, mask, types = rows
    return Window(ids, mask, types, 3, 0, length - 4)


def assert_right(windows: list[Window], logits: list[Logits]) -> None:
    assert len(windows) == len(logits)
    for sent, (start, end) in zip(windows, logits, strict=True):
        assert start.dtype == end.dtype == np.float32
        np.testing.assert_array_equal(start, sent.input_ids + sent.attention_mask)
        np.testing.assert_array_equal(end, sent.token_type_ids - sent.input_ids)


def soon(seconds: float = 30.0) -> float:
    return time.monotonic() + seconds


def run(url: str, scenario: Callable[[TritonModel], Awaitable[T]], **settings: Any) -> T:
    """Run a scenario with a client of its own, and see that it leaves no task behind."""

    async def with_client() -> T:
        model = TritonModel(url.split(","), **settings)
        try:
            result = await asyncio.wait_for(scenario(model), 90)
            assert asyncio.all_tasks() == {asyncio.current_task()}
            return result
        finally:
            await model.close()

    return asyncio.run(with_client())


async def until_answered(model: TritonModel) -> None:
    while True:
        try:
            return assert_right([window()], await model.predict([window()], deadline=soon(2)))
        except (ModelUnavailable, ModelTimeout, ModelOverloaded):
            await asyncio.sleep(0.1)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_repository(tmp_path_factory.mktemp("repository"))


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedTriton]:
    with EmbeddedTriton(repository, ports=triton_ports(), log_dir=tmp_path_factory.mktemp("logs")) as started:
        yield started


# The client


@pytest.mark.triton
def test_many_windows_of_several_requests_side_by_side(server: EmbeddedTriton) -> None:
    requests = [[window(length=length, seed=seed) for length in (64, 128, 384)] for seed in range(4)]

    async def scenario(model: TritonModel) -> list[list[Logits]]:
        return await asyncio.gather(*(model.predict(windows, deadline=soon()) for windows in requests))

    for windows, logits in zip(requests, run(server.url, scenario), strict=True):
        assert_right(windows, logits)


def test_no_window_needs_no_engine() -> None:
    assert run("127.0.0.1:1", lambda model: model.predict([], deadline=soon())) == []


@pytest.mark.triton
def test_ready_and_parameters(server: EmbeddedTriton) -> None:
    async def scenario(model: TritonModel) -> None:
        await model.check_ready(deadline=soon())
        assert (await model.loaded(deadline=soon())).parameters == {"identity_1": "toy"}

    run(server.url, scenario)


@pytest.mark.triton
@pytest.mark.alone
def test_deadline_passes_while_the_engine_computes_and_while_a_window_waits(server: EmbeddedTriton) -> None:
    async def scenario(model: TritonModel) -> None:
        slow = asyncio.create_task(model.predict([window(SLEEP, 1500)], deadline=soon()))
        await asyncio.sleep(0.3)
        with pytest.raises(ModelTimeout, match="before the engine answered"):
            await model.predict([window()], deadline=soon(0.3))
        with pytest.raises(ModelTimeout, match="deadline"):
            await model.predict([window()] * 10, deadline=soon(0.3))
        assert not slow.done()
        await slow
        with pytest.raises(ModelTimeout):
            await model.predict([window()], deadline=soon(-1))
        assert_right([window()], await model.predict([window()], deadline=soon()))

    run(server.url, scenario)


@pytest.mark.triton
def test_one_window_failing_cancels_the_others(server: EmbeddedTriton) -> None:
    async def scenario(model: TritonModel) -> None:
        with pytest.raises(ModelBroken, match="no such bucket"):
            await model.predict([window(RAISE), *[window(SLEEP, 100)] * 10], deadline=soon())
        assert_right([window()], await model.predict([window()], deadline=soon()))

    run(server.url, scenario)


@pytest.mark.triton
def test_cancelling_the_caller_ends_its_calls(server: EmbeddedTriton) -> None:
    async def scenario(model: TritonModel) -> None:
        requests = [asyncio.create_task(model.predict([window(SLEEP, 200)] * 4, deadline=soon())) for _ in range(3)]
        await asyncio.sleep(0.3)
        for request in requests:
            request.cancel()
        await asyncio.wait(requests)
        assert all(request.cancelled() for request in requests)
        assert_right([window()] * 8, await model.predict([window()] * 8, deadline=soon()))

    run(server.url, scenario)


@pytest.mark.triton
def test_full_queue_of_triton_is_overload(server: EmbeddedTriton) -> None:
    async def scenario(model: TritonModel) -> None:
        with pytest.raises(ModelOverloaded, match="queue"):
            await model.predict([window(SLEEP, 300)] * 40, deadline=soon())
        await until_answered(model)  # Triton drops the cancelled ones when the running one has ended

    run(server.url, scenario)


@pytest.mark.triton
def test_nan_is_broken(server: EmbeddedTriton) -> None:
    with pytest.raises(ModelBroken, match="'start_logits' holds NaN"):
        run(server.url, lambda model: model.predict([window(NAN)], deadline=soon()))


@pytest.mark.triton
def test_wrong_shape_is_broken(server: EmbeddedTriton) -> None:
    with pytest.raises(ModelBroken, match=r"'end_logits' is not FP32 \[1, 64\]: FP32 \[1, 63\] in 252 bytes"):
        run(server.url, lambda model: model.predict([window(SHAPE)], deadline=soon()))


@pytest.mark.triton
def test_what_is_not_there_is_unavailable(server: EmbeddedTriton) -> None:
    async def asked(model: TritonModel) -> None:
        with pytest.raises(ModelUnavailable, match="bert_de"):
            await model.check_ready(deadline=soon())
        with pytest.raises(ModelUnavailable, match="bert_de"):
            await model.predict([window()], deadline=soon())

    async def unconnected(model: TritonModel) -> None:
        with pytest.raises(ModelUnavailable, match=r"No connection to Triton at 127\.0\.0\.1:1"):
            await model.predict([window()] * 3, deadline=soon())

    async def closed(model: TritonModel) -> None:
        await model.close()
        with pytest.raises(ModelUnavailable, match="closed"):
            await model.predict([window()], deadline=soon())

    run(server.url, asked, model="bert_de")
    run("127.0.0.1:1", unconnected)
    run(server.url, closed)


@pytest.mark.triton
def test_a_dead_replica_is_passed_over(server: EmbeddedTriton) -> None:
    windows = [window(seed=seed) for seed in range(6)]
    assert_right(windows, run(f"127.0.0.1:1,{server.url}", lambda model: model.predict(windows, deadline=soon())))


def test_bounds_are_checked() -> None:
    with pytest.raises(ValueError, match="urls"):
        TritonModel([])


@pytest.mark.triton
def test_two_calls_for_each_instance_at_each_address(server: EmbeddedTriton) -> None:
    async def concurrency(model: TritonModel) -> tuple[int, int]:
        other = model.at("bert_qa", 1)
        return (await model.loaded(deadline=soon())).concurrency, (await other.loaded(deadline=soon())).concurrency

    port = server.url.rpartition(":")[2]
    assert run(server.url, concurrency) == (2, 2)
    assert run(f"localhost:{port},dns:///127.0.0.1:{port}", concurrency) == (4, 4)


@pytest.mark.triton
def test_a_name_server_that_hangs_holds_up_no_question(server: EmbeddedTriton, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up: list[str] = []

    async def scenario(model: TritonModel) -> None:
        answers = asyncio.Event()

        async def lookup(url: str) -> int:
            looked_up.append(url)
            await answers.wait()
            return 3

        monkeypatch.setattr(triton, "_addresses", lookup)
        for _ in range(3):
            assert await model.loaded(deadline=soon()) == Loaded({"identity_1": "toy"}, 2)  # as for one address
        assert looked_up == [server.url], "one lookup at a time"
        answers.set()
        for _ in range(2):
            assert (await model.loaded(deadline=soon())).concurrency == 6
        assert looked_up == [server.url] * 2
        answers.clear()
        assert (await model.loaded(deadline=soon())).concurrency == 6
        await model.close()  # leaves no lookup behind
        await asyncio.sleep(0)

    run(server.url, scenario)


class FakeTriton(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Keeps what it is sent, and at first refuses as often as it is told."""

    refusal = grpc.StatusCode.UNAVAILABLE, "Socket closed"

    def __init__(self, refusals: int, reply: Any) -> None:
        self.refusals, self.reply = refusals, reply
        self.requests: list[Any] = []

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        self.requests.append((request, context.time_remaining()))
        if len(self.requests) <= self.refusals:
            await context.abort(*self.refusal)
        return self.reply


def ask_fake(fake: FakeTriton) -> list[Logits]:
    async def scenario() -> list[Logits]:
        fake_server = grpc.aio.server()
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(fake, fake_server)
        port = fake_server.add_insecure_port("127.0.0.1:0")
        await fake_server.start()
        model = TritonModel([f"localhost:{port}"])
        triton.request_id.set("r-17")
        try:
            return await model.predict([window()], deadline=soon(5))
        finally:
            await model.close()
            await fake_server.stop(None)

    return asyncio.run(scenario())


def reply(*names: str) -> Any:
    outputs = [{"name": name, "datatype": "FP32", "shape": [1, 64]} for name in names]
    return service_pb2.ModelInferResponse(outputs=outputs, raw_output_contents=[bytes(256)] * len(names))


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
    with pytest.raises(ModelBroken, match=problem):
        ask_fake(FakeTriton(0, answer))


def test_a_server_that_has_not_loaded_the_version_yet_is_passed_over() -> None:
    fake = FakeTriton(2, reply(*OUTPUT_NAMES))
    fake.refusal = grpc.StatusCode.NOT_FOUND, "Request for unknown model: 'bert_qa' version 2 is not found"
    assert len(ask_fake(fake)) == 1
    assert len(fake.requests) == 3


def test_lost_connection_is_retried_a_few_times_only(monkeypatch: pytest.MonkeyPatch) -> None:
    # Counted where they fail: on a busy machine, one of the three was once lost before it reached the fake.
    failed = Mock(wraps=triton._translate)
    monkeypatch.setattr(triton, "_translate", failed)
    fake = FakeTriton(99, None)
    with pytest.raises(ModelUnavailable, match="Socket closed"):
        ask_fake(fake)
    assert failed.call_count == 3
    assert 0 < len(fake.requests) <= 3


# The circuit breaker, against gRPC servers whose behaviour is set


class Moody(FakeTriton):
    """Answers as the real server's model does, unless it is in a mood."""

    def __init__(self) -> None:
        super().__init__(0, reply(*OUTPUT_NAMES))
        self.mood = "well"

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        self.requests.append((request, context.time_remaining()))
        ids, mask, types = (np.frombuffer(raw, np.int32) for raw in request.raw_input_contents)
        logits = [(ids + mask).astype(np.float32), (types - ids).astype(np.float32)]
        match self.mood:
            case "shape":
                logits[1] = logits[1][1:]
            case "nan":
                logits[1][7] = np.nan
            case "garbage":
                await context.abort(grpc.StatusCode.INTERNAL, "failed to parse \\xff\\xfe")
            case "silent":
                await asyncio.sleep(20)
            case "slow":
                await asyncio.sleep(0.2)
        answer = reply(*OUTPUT_NAMES)
        answer.raw_output_contents[:] = [values.tobytes() for values in logits]
        return answer

    async def ModelReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ModelReadyResponse(ready=True)


class Watched:
    """Keeps every state that circuits go through."""

    def __init__(self) -> None:
        self.states: dict[str, list[str]] = {}

    def __call__(self, url: str, model: str, version: str) -> Callable[[State], None]:
        states = self.states[url] = ["closed"]
        return lambda state: states.append(state.name.lower())


@contextlib.asynccontextmanager
async def served(*fakes: FakeTriton, ports: tuple[int, ...] = ()) -> AsyncIterator[list[str]]:
    """Give the addresses under which fakes are served, each by a server of its own."""
    servers, urls = [], []
    for fake, wanted in zip(fakes, ports or (0,) * len(fakes), strict=True):
        fake_server = grpc.aio.server()
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(fake, fake_server)
        urls.append(f"127.0.0.1:{fake_server.add_insecure_port(f'127.0.0.1:{wanted}')}")
        await fake_server.start()
        servers.append(fake_server)
    try:
        yield urls
    finally:
        await asyncio.gather(*(fake_server.stop(None) for fake_server in servers))


async def fail(model: TritonModel, times: int) -> list[str]:
    said = []
    for _ in range(times):
        with pytest.raises(ModelError) as failure:
            await model.predict([window()], deadline=soon(5))
        said.append(f"{type(failure.value).__name__}: {failure.value}")
    return said


@pytest.mark.parametrize("mood", ["shape", "nan", "garbage"])
def test_broken_engine_is_left_alone_and_taken_up_again(mood: str) -> None:
    async def scenario() -> None:
        fake, watched = Moody(), Watched()
        async with served(fake) as [url]:
            model = TritonModel([url], watch_circuit=watched)
            fake.mood = mood
            said = await fail(model, 20)
            assert all(line.startswith("ModelBroken: ") for line in said[:5])
            assert all(line.startswith("ModelUnavailable: Triton failed several times") for line in said[5:]), said
            assert said[4].split(": ")[1] in said[5]  # and why, in our own words
            assert len(fake.requests) == 5
            fake.mood = "well"
            await until_answered(model)
            assert len(fake.requests) <= 7  # perhaps one trial that failed
            await model.close()
        assert watched.states[url][:2] == ["closed", "open"]
        assert watched.states[url][-2:] == ["half_open", "closed"]

    asyncio.run(scenario())


def test_lost_engine_costs_no_retries_and_is_found_again() -> None:
    async def scenario() -> None:
        fake, watched = Moody(), Watched()
        async with served(fake) as [url]:
            model = TritonModel([url], watch_circuit=watched)
            await model.predict([window()] * 4, deadline=soon(5))
        said = await fail(model, 3)
        assert watched.states[url][1] == "open"
        assert "No connection to Triton" in said[-1]
        begun = time.monotonic()
        said = await fail(model, 200)
        # Each used to wait 0.3 s for its retries, 60 s together.
        assert sum("left alone" in line for line in said) > 190, (said, time.monotonic() - begun)
        with pytest.raises(ModelUnavailable):
            await model.check_ready(deadline=soon(1))
        async with served(fake, ports=(int(url.rpartition(":")[2]),)):
            await until_answered(model)
            # Whoever comes during the trial waits for its outcome: many windows at once are no obstacle.
            await model.predict([window()] * 16, deadline=soon(5))
            await model.close()
        assert watched.states[url][-1] == "closed"

    asyncio.run(scenario())


@pytest.mark.alone
def test_request_of_many_windows_closes_the_circuit() -> None:
    async def scenario() -> None:
        fake, watched = Moody(), Watched()
        async with served(fake) as [url]:
            model = TritonModel([url], watch_circuit=watched)
            fake.mood = "nan"
            await fail(model, 6)
            fake.mood = "slow"
            await asyncio.sleep(0.3)
            requests = [model.predict([window()] * 8, deadline=soon(5)) for _ in range(4)]
            assert [len(logits) for logits in await asyncio.gather(*requests)] == [8] * 4
            assert watched.states[url] == ["closed", "open", "half_open", "closed"]
            await model.close()

    asyncio.run(scenario())


@pytest.mark.alone
@pytest.mark.parametrize("mood", ["shape", "nan", "garbage", "silent"])
def test_no_request_sees_a_broken_replica_beside_one_that_is_well(mood: str) -> None:
    async def scenario() -> None:
        broken, well, watched = Moody(), Moody(), Watched()
        async with served(broken, well) as urls:
            model = TritonModel(urls, watch_circuit=watched)
            broken.mood = mood
            if mood == "silent":  # only the deadline tells, until the circuit is open
                for _ in range(5):
                    with pytest.raises(ModelTimeout):
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
            await model.close()

    asyncio.run(scenario())


def test_short_deadlines_and_cancelled_calls_open_no_circuit() -> None:
    async def scenario() -> None:
        fake, watched = Moody(), Watched()
        async with served(fake) as [url]:
            model = TritonModel([url], watch_circuit=watched)
            fake.mood = "slow"
            for _ in range(8):
                with pytest.raises(ModelTimeout):
                    await model.predict([window()], deadline=soon(0.05))
                task = asyncio.create_task(model.predict([window()] * 3, deadline=soon(5)))
                await asyncio.sleep(0.01)
                task.cancel()
                await asyncio.wait([task])
            assert watched.states[url] == ["closed"]
            await model.predict([window()], deadline=soon(5))
            await model.close()

    asyncio.run(scenario())


@pytest.mark.parametrize(("jump", "mood"), [(3600, "well"), (-3600, "silent")])
def test_the_wall_clock_may_jump_while_a_call_is_made(monkeypatch: pytest.MonkeyPatch, jump: int, mood: str) -> None:
    # What Python reads of the clock is from before the jump; what gRPC's core reads, a moment later, from after it.
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - jump)

    async def scenario() -> None:
        fake = Moody()
        fake.mood = mood
        async with served(fake) as [url]:
            model = TritonModel([url])
            asked = asyncio.wait_for(model.predict([window()], deadline=soon(0.5 if mood == "silent" else 5)), 10)
            if mood == "silent":
                with pytest.raises(ModelTimeout):
                    await asked
            else:
                assert_right([window()], await asked)
            await model.close()

    asyncio.run(scenario())


def test_calls_that_fail_together_are_one_failure() -> None:
    circuit = Circuit()
    sent = time.monotonic()
    for _ in range(100):
        circuit.failed(sent, "the connection broke")
    assert circuit.allows()
    for _ in range(FAILURES - 1):
        circuit.failed(time.monotonic(), "and again")
    assert not circuit.allows()
    circuit.succeeded()  # one that was on its way
    assert circuit.allows()


def test_version_that_is_broken_leaves_the_one_before_alone() -> None:
    async def scenario() -> None:
        fake = Moody()
        async with served(fake) as [url]:
            old = TritonModel([url], version=1)
            new = old.at("bert_qa", 2)
            fake.mood = "nan"
            await fail(new, 10)
            fake.mood = "well"
            await old.predict([window()], deadline=soon(5))
            await old.close()

    asyncio.run(scenario())


# Replicas of all moods


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
    async def ask(model: TritonModel, number: int, seconds: float, goes_away: bool) -> None:
        task = asyncio.ensure_future(model.predict([window(number)], deadline=soon(10 if goes_away else seconds)))
        await asyncio.wait([task], timeout=seconds if goes_away else None)
        if task.cancel():
            await asyncio.wait([task])
        elif not task.exception():
            assert_right([window(number)], task.result())
        else:
            assert isinstance(task.exception(), ModelError)

    async def scenario() -> None:
        moods = [{number: moods[side] for number, (*moods, _, _) in enumerate(fates)} for side in (0, 1)]
        fakes = [Replying(each) for each in moods]
        async with served(*fakes) as urls:
            model = TritonModel(urls)
            await asyncio.gather(*(ask(model, number, *fate[2:]) for number, fate in enumerate(fates)))
            await no_call_is_left(*fakes)
            await model.close()
            # gRPC's server, which the fakes run in, has tasks of its own that come and go; those are compiled.
            left = {task for task in asyncio.all_tasks() if inspect.iscoroutine(task.get_coro())}
            assert left == {asyncio.current_task()}

    asyncio.run(scenario())


# Replicas behind one name, as a headless service of Kubernetes has them: a name server of our own tells the addresses


class Replica(FakeTriton):
    """One of several; takes a moment, so that calls are in flight when it ends."""

    def __init__(self) -> None:
        super().__init__(0, reply(*OUTPUT_NAMES))

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        await asyncio.sleep(0.005)
        return await super().ModelInfer(request, context)

    async def start(self, address: str, port: int, **options: int) -> int:
        self.server = grpc.aio.server(options=[(f"grpc.{name}", value) for name, value in options.items()])
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self.server)
        bound = self.server.add_insecure_port(f"{address}:{port}")
        await self.server.start()
        return int(bound)

    async def is_called(self, times: int = 10) -> None:
        goal, end = len(self.requests) + times, soon(15)
        while len(self.requests) < goal:
            assert time.monotonic() < end, "waited in vain"
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def asking(url: str) -> AsyncIterator[None]:
    """Eight clients that ask without pause, each request of two windows; none may fail."""
    model = TritonModel([url])
    done = asyncio.Event()

    async def ask() -> None:
        while not done.is_set():
            await model.predict([window(), window()], deadline=soon(5))

    clients = [asyncio.create_task(ask()) for _ in range(8)]
    try:
        yield
    finally:
        done.set()
        await asyncio.gather(*clients)
        await model.close()


def test_all_addresses_of_a_name_are_called_and_no_request_misses_one_that_dies() -> None:
    async def scenario() -> None:
        first, second = Replica(), Replica()
        port = await first.start("127.0.0.1", 0)
        await second.start("127.0.0.2", port)
        async with Names("127.0.0.1", "127.0.0.2").serving() as name, asking(f"{name}:{port}"):
            await first.is_called()
            await second.is_called()
            before = len(second.requests)
            await first.is_called(100)
            assert len(second.requests) - before > 80  # turn by turn
            await second.server.stop(None)
            await first.is_called()
            await second.start("127.0.0.2", port)
            await second.is_called()
        await asyncio.gather(first.server.stop(None), second.server.stop(None))

    asyncio.run(scenario())


def test_replicas_that_come_and_go_under_a_name_are_found() -> None:
    async def scenario() -> None:
        first, second = Replica(), Replica()
        port = await first.start("127.0.0.1", 0, max_connection_age_ms=500)
        names = Names("127.0.0.1")
        async with names.serving() as name, asking(f"{name}:{port}"):
            await first.is_called()
            await second.start("127.0.0.2", port)
            names.addresses = ("127.0.0.1", "127.0.0.2")
            await second.is_called()  # once a connection to the first has reached its age
            names.addresses = ("127.0.0.2",)
            await first.server.stop(None)
            await second.is_called()
        await second.server.stop(None)

    asyncio.run(scenario())


def test_replicas_that_are_all_replaced_at_once_are_found_before_a_client_gives_up() -> None:
    async def scenario() -> None:
        old, new = Replica(), Replica()
        port = await old.start("127.0.0.1", 0)
        names = Names("127.0.0.1")
        async with names.serving() as name:
            model = TritonModel([f"{name}:{port}"])
            await model.predict([window()], deadline=soon(5))
            names.addresses = ("127.0.0.2",)
            await old.server.stop(None)
            await new.start("127.0.0.2", port)
            end = soon(15)  # gRPC's own pause between two questions to a name server is 30 s
            while not new.requests:
                assert time.monotonic() < end, "waited in vain"
                with contextlib.suppress(ModelUnavailable):
                    await model.predict([window()], deadline=soon(5))
            await model.close()
        await new.server.stop(None)

    asyncio.run(scenario())


# The embedded server


@pytest.mark.triton
def test_model_whose_process_dies_is_started_again(repository: Path, tmp_path: Path) -> None:
    said: list[str] = []

    async def scenario(model: TritonModel) -> None:
        with pytest.raises((ModelBroken, ModelUnavailable)):
            await model.predict([window(CRASH)], deadline=soon())
        while not any("died; see" in line for line in said):
            await asyncio.sleep(0.1)
        await until_answered(model)

    with EmbeddedTriton(repository, ports=triton_ports(), log_dir=tmp_path, report=said.append) as server:
        run(server.url, scenario)


@pytest.mark.triton
def test_paths_with_spaces(tmp_path: Path) -> None:
    directory = tmp_path / "it's my project"
    spaced = write_repository(directory / "model repository")
    with EmbeddedTriton(spaced, ports=triton_ports(), log_dir=directory / "the logs", ready_timeout_s=60) as server:
        assert run(server.url, lambda model: model.loaded(deadline=soon())).parameters == {"identity_1": "toy"}
        assert server.log_file.stat().st_size


@pytest.mark.triton
def test_logs_that_cannot_be_written_are_named(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TritonError, match=r"file/logs: no directory for logs \(Not a directory\); choose another"):
        EmbeddedTriton(repository, ports=triton_ports(), log_dir=tmp_path / "file" / "logs").start()


def shared_memory() -> set[Path]:
    """Files of this process in shared memory."""
    return set(Path("/dev/shm").glob(f"bertqa_{os.getpid()}_*"))


@pytest.mark.triton
def test_killed_server_is_restarted_and_two_live_side_by_side(repository: Path, tmp_path: Path) -> None:
    said: list[str] = []
    before = shared_memory()  # of the server that other tests share
    with (
        EmbeddedTriton(repository, ports=triton_ports(), log_dir=tmp_path) as other,
        EmbeddedTriton(repository, ports=other.ports, log_dir=tmp_path, report=said.append) as killed,
    ):
        assert not {killed.ports.grpc, killed.ports.http} & {other.ports.grpc, other.ports.http}
        assert any(f"grpc port {other.ports.grpc} is taken, using {killed.ports.grpc}" in line for line in said)
        first = killed.pid

        async def scenario(model: TritonModel) -> None:
            await model.predict([window()], deadline=soon())
            assert first
            os.kill(first, signal.SIGKILL)
            while killed.pid in (None, first):
                await asyncio.sleep(0.05)
            await until_answered(model)  # the same client finds the new server

        run(killed.url, scenario)
        assert any("killed by SIGKILL" in line and "restarting" in line for line in said)
        assert_right([window()], run(other.url, lambda model: model.predict([window()], deadline=soon())))
        pids = [process for process in (killed.pid, other.pid) if process]
    assert not any(Path(f"/proc/{process}").exists() for process in pids)
    assert shared_memory() <= before


@pytest.mark.triton
def test_port_taken_by_something_else(repository: Path, tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        taken = listener.getsockname()[1]
        assert free_port("127.0.0.1", taken) > taken
        assert free_port("127.0.0.1", taken, avoid=range(taken, taken + 5)) > taken + 4
        with EmbeddedTriton(repository, ports=TritonPorts(taken, 0, 0), log_dir=tmp_path) as moved:
            assert moved.ports.grpc > taken
            assert moved.log_file.name == f"triton-{moved.ports.grpc}.log"


@pytest.mark.triton
def test_model_that_cannot_be_loaded_gives_the_reason(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = write_repository(tmp_path / "broken")
    (broken / "bert_qa" / "config.pbtxt").write_text('name: "bert_qa" bakcend: "python"')
    with pytest.raises(TritonError, match=r"could not be loaded|ended with exit code 1 \(.*bakcend"):
        EmbeddedTriton(broken, ports=triton_ports(), log_dir=tmp_path).start()
    monkeypatch.setenv("TOY_MODEL_FAILS", "1")
    with pytest.raises(TritonError, match=r"could not be loaded: .*engine\.bin is not there.*; see .*\.log"):
        EmbeddedTriton(repository, ports=triton_ports(), log_dir=tmp_path).start()


@pytest.mark.triton
def test_start_that_takes_too_long_is_given_up(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(TritonError, match="is not ready after 0 s"):
        EmbeddedTriton(repository, ports=triton_ports(), log_dir=tmp_path, ready_timeout_s=0).start()


@pytest.mark.triton
def test_what_is_missing_is_named_with_its_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TritonError, match=r"holds no built version; run .*engine_builder"):
        EmbeddedTriton(tmp_path, log_dir=tmp_path).start()
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(triton_install, "_PYTHON", "3.7")
    with pytest.raises(TritonError, match=r"with Python 3\.8, 3\.9, 3\.10.* this is Python 3\.7"):
        find_triton(tmp_path / "cache")
    monkeypatch.setattr(triton_install, "WHEEL", "no-such-wheel")
    with pytest.raises(TritonError, match="pip install --no-deps"):
        find_triton(tmp_path / "cache")


def processes_with(text: str) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if text in entry.read_bytes().decode(errors="replace"):
                found.append(int(entry.parent.name))
        except OSError:  # ended in between
            continue
    return found


@pytest.mark.triton
def test_nothing_outlives_a_launcher_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = write_repository(tmp_path / "repository")
    program = (
        "import sys, time; from pathlib import Path\n"
        "from service.runtime.ports import TritonPorts\nfrom service.runtime.triton_process import EmbeddedTriton\n"
        "triton = EmbeddedTriton(Path(sys.argv[1]), ports=TritonPorts(0, 0, 0), log_dir=Path(sys.argv[2]))\n"
        "triton.start(); time.sleep(600)"
    )
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", program, str(repository), str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
    ) as launcher:
        until(lambda: len(processes_with(str(repository))) >= 3 or launcher.poll() is not None)  # + server and stub
        launcher.kill()
    until(lambda: not processes_with(str(repository)))
    left = {*Path("/dev/shm").glob(f"bertqa_{launcher.pid}_*"), *temporary.iterdir()}
    assert {path.parent for path in left} == {Path("/dev/shm"), temporary}, "nobody was there to remove them"
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    with EmbeddedTriton(repository, ports=triton_ports(), log_dir=tmp_path):  # the next start
        assert not any(path.exists() for path in left)


def test_launcher_told_to_end_ends_the_engine_build_too(tmp_path: Path) -> None:
    builder = tmp_path / "engine_builder"
    builder.mkdir()
    (builder / "__init__.py").touch()
    (builder / "__main__.py").write_text("import sys, time; print('building', flush=True); time.sleep(600)")
    program = (
        "import sys; from pathlib import Path; from service.runtime import engine, launcher\n"
        "engine.PROJECT = here = Path(sys.argv[1])\n"
        "sys.exit(launcher.launch(launcher.ServeOptions(port=0, repository=here, checkpoint=here)))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as launcher:
        try:
            assert launcher.stdout
            assert launcher.stdout.readline() == "building\n"
            launcher.send_signal(signal.SIGTERM)
            assert launcher.wait(30) == 0
        finally:
            launcher.kill()
    until(lambda: not processes_with(str(tmp_path)))


@pytest.mark.triton
def test_launcher_serves_and_ends_in_order(bundle: Bundle, tmp_path: Path) -> None:
    directory = publish_toy_bundle(Repository(tmp_path / "model_repository"), bundle, 1)
    write_repository(tmp_path / "model_repository", Manifest.read(directory / "manifest.json").identity)
    command = [sys.executable, "-m", "service", "--port=0", "--triton-grpc-port=0", f"--log-dir={tmp_path}"]
    with subprocess.Popen(
        [*command, f"--repository={directory.parent.parent}"],
        cwd=ROOT,
        env={**os.environ, "BERTQA_TRITON_TLS_CA": "/meant/for/another/triton.pem"},
        stderr=subprocess.PIPE,
        text=True,
    ) as launcher:
        try:
            assert launcher.stderr
            lines: list[str] = []
            for line in launcher.stderr:
                lines.append(line)
                if "ready at http://" in line:
                    break
            assert "ready at http://127.0.0.1:" in "".join(lines[-1:]), lines
            connection = http.client.HTTPConnection("127.0.0.1", int(lines[-1].rpartition(":")[2]), timeout=30)
            with closing(connection):
                connection.request("GET", "/health/ready")
                assert connection.getresponse().status == 200
            launcher.send_signal(signal.SIGINT)
            assert launcher.wait(60) == 0
        finally:
            launcher.kill()
    until(lambda: not processes_with(str(tmp_path)))


@pytest.mark.triton
def test_every_line_of_the_launcher_and_its_children_is_json(tmp_path: Path) -> None:
    """The builder's, the service's, and those of gRPC's core, which knows no log."""
    checkpoint = write_checkpoint(tmp_path / "tiny")
    examples = [Example("a", "t", "Who wrote it?", CONTEXT, (Reference("Ada", CONTEXT.index("Ada")),))]
    (checkpoint / "gate.json").write_text(json.dumps(as_squad(examples)))
    command = [sys.executable, "-m", "service", "--port=0", "--triton-grpc-port=0", f"--log-dir={tmp_path}"]
    command += [f"--repository={tmp_path / 'models'}", f"--checkpoint={checkpoint}"]
    environment = {"BERTQA_LOG_FORMAT": "json", "GRPC_VERBOSITY": "debug", "BERTQA_LOG_TEXTS": ""}
    with (
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}, stdout=log, stderr=log) as launcher,
    ):
        try:
            until(
                lambda: launcher.poll() is not None or b"ready at http://" in (tmp_path / "log").read_bytes(),
                seconds=120,
            )
            (url,) = re.findall(r"ready at (http://[\d.:]+)", (tmp_path / "log").read_text())
            assert httpx.get(f"{url}/info", trust_env=False).status_code == 200
            launcher.send_signal(signal.SIGTERM)
            assert launcher.wait(60) == 0
        finally:
            launcher.kill()
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    said: dict[str, list[str]] = defaultdict(list)
    for line in lines:
        assert line.keys() >= {"time", "level", "logger", "message"}
        said[line["logger"]].append(line["message"])
    assert said["bertqa.launcher"][-1] == "ended"
    assert any("built in" in message for message in said["bertqa.builder"])
    assert not any("it/s" in message or "\r" in message for message in said["bertqa.builder"]), "no bars"
    assert said["bertqa.access"] == ["GET /info 200"]
    assert any(re.match(r"[IDEW]\d{4} ", message) for message in said["bertqa.output"]), said["bertqa.output"][:5]


# Who may ask Triton: APIs that are closed, and TLS


@pytest.mark.triton
def test_apis_that_nobody_needs_are_closed(server: EmbeddedTriton) -> None:
    async def refused(method: str, request: Any) -> None:
        async with grpc.aio.insecure_channel(server.url) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await getattr(service_pb2_grpc.GRPCInferenceServiceStub(channel), method)(request)
            assert "restricted" in str(error.value.details()) or "polling is enabled" in str(error.value.details())

    requests = {
        "SystemSharedMemoryRegister": service_pb2.SystemSharedMemoryRegisterRequest(name="a", key="/a", byte_size=4),
        "SystemSharedMemoryStatus": service_pb2.SystemSharedMemoryStatusRequest(),
        "CudaSharedMemoryStatus": service_pb2.CudaSharedMemoryStatusRequest(),
        "TraceSetting": service_pb2.TraceSettingRequest(),
        "LogSettings": service_pb2.LogSettingsRequest(),
        "RepositoryModelLoad": service_pb2.RepositoryModelLoadRequest(model_name="bert_qa"),
        "RepositoryModelUnload": service_pb2.RepositoryModelUnloadRequest(model_name="bert_qa"),
    }
    for method, request in requests.items():
        asyncio.run(refused(method, request))
    for path, method in {
        "systemsharedmemory/status": "GET",
        "systemsharedmemory/region/a/register": "POST",
        "cudasharedmemory/status": "GET",
        "trace/setting": "GET",
        "logging": "POST",
        "repository/models/bert_qa/load": "POST",
        "repository/models/bert_qa/unload": "POST",
    }.items():
        connection = http.client.HTTPConnection("127.0.0.1", server.ports.http, timeout=30)
        with closing(connection):
            connection.request(method, f"/v2/{path}", body=b"{}" if method == "POST" else None)
            response = connection.getresponse()
            said = response.read().decode()
            assert response.status >= 400, path
            assert "restricted" in said or "polling is enabled" in said, (path, said)
    assert_right([window()], run(server.url, lambda model: model.predict([window()], deadline=soon())))


def raw_http(port: int, header: bytes) -> bytes:
    """The reply to a request over HTTP/1.1 with a header that no library would send."""
    request = b"GET /v2/systemsharedmemory/status HTTP/1.1\r\nhost: x\r\n%b\r\nconnection: close\r\n\r\n" % header
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(request)
        return b"".join(iter(partial(connection.recv, 65536), b""))


def raw_grpc(port: int, name: bytes, value: bytes) -> bytes:
    """The same over HTTP/2, frame by frame; returns what came within a second."""

    def frame(kind: int, flags: int, stream: int, content: bytes) -> bytes:
        return len(content).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + content

    headers = {
        b":method": b"POST",
        b":scheme": b"http",
        b":path": b"/inference.GRPCInferenceService/SystemSharedMemoryStatus",
        b":authority": b"x",
        b"content-type": b"application/grpc",
        b"te": b"trailers",
        name: value,
    }
    block = b"".join(b"\0%c%b%c%b" % (len(key), key, len(text), text) for key, text in headers.items())
    with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b""))
        connection.sendall(frame(1, 4, 1, block) + frame(0, 1, 1, bytes(5)))
        received = bytearray()
        with contextlib.suppress(TimeoutError):
            while chunk := connection.recv(65536):
                received += chunk
                if len(received) > 1_000_000:
                    break
        return bytes(received)


@pytest.mark.triton
def test_what_other_users_can_read_about_an_embedded_triton_opens_nothing(server: EmbeddedTriton) -> None:
    regions = [path for path in shared_memory() if path.stat().st_size]
    assert regions, "the Python backend's"
    assert {stat.S_IMODE(path.stat().st_mode) for path in shared_memory()} == {0o600}
    arguments = Path(f"/proc/{server.pid}/cmdline").read_text().split("\0")
    keys = {argument.split(":", 1)[1] for argument in arguments if "restricted" in argument}
    assert keys
    for key in keys:
        name, value = key.encode().split(b"=")
        for header in (b"%b: %b", b"%b:%b", b"%b : %b", b'"%b": %b'):
            assert raw_http(server.ports.http, header % (name, value)).startswith(b"HTTP/1.1 403"), header
        for prefix in (b"", b"triton-grpc-protocol-"):
            reply = raw_grpc(server.ports.grpc, prefix + name, value)
            assert reply
            assert b"grpc-status\x010" not in reply, "not a success"
    assert b"restricted" in raw_grpc(server.ports.grpc, b"x-other", b"none"), "so a request as such is understood"


@pytest.mark.triton
def test_an_embedded_triton_listens_on_the_loopback_interface_alone(server: EmbeddedTriton) -> None:
    ports, listening = {server.ports.grpc, server.ports.http, server.ports.metrics}, set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{server.pid}/net/{table}").read_text().splitlines()[1:]:
            address, port = line.split()[1].split(":")
            if line.split()[3] == "0A" and int(port, 16) in (
                server.ports.grpc,
                server.ports.http,
                server.ports.metrics,
            ):
                listening.add((address, int(port, 16)))
    mapped = "0000000000000000FFFF00000100007F"  # ::ffff:127.0.0.1, as gRPC writes it
    assert {(address.replace(mapped, "0100007F"), port) for address, port in listening} == {
        ("0100007F", port) for port in ports
    }


@pytest.mark.triton
@pytest.mark.parametrize("mutual", [False, True], ids=["tls", "mutual"])
def test_tls_to_triton(tmp_path: Path, repository: Path, mutual: bool) -> None:
    files = certificates(tmp_path)

    def credentials(ca: str, own: str = "") -> Any:
        pair = (str(files / f"{own}.pem"), str(files / f"{own}.key")) if own else ()
        return tls_credentials(str(files / f"{ca}.pem"), *pair)

    async def answered(model: TritonModel) -> None:
        assert_right([window()] * 3, await model.predict([window()] * 3, deadline=soon()))

    async def refused(model: TritonModel) -> None:
        with pytest.raises(ModelUnavailable):
            await model.predict([window()], deadline=soon(10))

    with triton_with(tmp_path, repository, *tls_flags(files, mutual=mutual)) as url:
        run(url, answered, tls=credentials("ca", "client" if mutual else ""))
        strangers = [None, credentials("other")]
        if mutual:
            strangers += [credentials("ca"), credentials("ca", "stranger")]
        for tls in strangers:
            run(url, refused, tls=tls)


def test_tls_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    assert tls_credentials("") is None
    with pytest.raises(ValueError, match=r"BERTQA_TRITON_TLS_CA: .*none cannot be read"):
        tls_credentials(str(tmp_path / "none"))
    for settings, name in (
        ({"triton_tls_cert": "a"}, "CERT"),
        ({"triton_tls_cert": "a", "triton_tls_key": "b"}, "CA"),
    ):
        with pytest.raises(ValueError, match=f"BERTQA_TRITON_TLS_{name}"):
            Settings(**settings)  # type: ignore[arg-type]
