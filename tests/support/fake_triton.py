"""gRPC servers that answer as Triton does, in whatever mood a test sets."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc.aio
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from bertqa.spans import Logits
from bertqa.windows import OUTPUT_NAMES
from service.observability.request_context import RequestContext, request_context
from service.triton.channels import Channels
from service.triton.circuit_breaker import State
from service.triton.client import TritonEngine
from service.triton.errors import EngineError
from tests.support.toy_triton import soon, window


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


def reply(*names: str) -> Any:
    outputs = [{"name": name, "datatype": "FP32", "shape": [1, 64]} for name in names]
    return service_pb2.ModelInferResponse(outputs=outputs, raw_output_contents=[bytes(256)] * len(names))


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


async def fail(model: TritonEngine, times: int) -> list[str]:
    said = []
    for _ in range(times):
        with pytest.raises(EngineError) as failure:
            await model.predict([window()], deadline=soon(5))
        said.append(f"{type(failure.value).__name__}: {failure.value}")
    return said


def ask_fake(fake: FakeTriton) -> list[Logits]:
    async def scenario() -> list[Logits]:
        fake_server = grpc.aio.server()
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(fake, fake_server)
        port = fake_server.add_insecure_port("127.0.0.1:0")
        await fake_server.start()
        channels = Channels([f"localhost:{port}"])
        model = channels.engine()
        request_context.set(RequestContext("r-17"))
        try:
            return await model.predict([window()], deadline=soon(5))
        finally:
            await channels.close()
            await fake_server.stop(None)

    return asyncio.run(scenario())
