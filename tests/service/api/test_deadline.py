"""The deadline of a request, and clients that do not wait for it."""

import asyncio
import json
import socket
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi import FastAPI
from starlette.requests import ClientDisconnect, Request

from service.api.deadline import GONE, unless_gone
from service.runtime.http_protocol import BoundedProtocol
from service.triton.errors import EngineTimeout
from tests.support.asking import ASKED, problem
from tests.support.servers import serving
from tests.support.toy_model import FakeEngine
from tests.support.waiting import until

MakeApp = Callable[..., FastAPI]


@pytest.mark.parametrize("http", ["httptools", BoundedProtocol])
def test_a_client_that_leaves_stops_the_engine(
    make_app: MakeApp, engine: FakeEngine, http: type[BoundedProtocol] | str
) -> None:
    with serving(make_app(), http=http) as url:
        leave(url, engine)


def leave(url: str, engine: FakeEngine) -> None:
    engine.delay_s = 60
    body = json.dumps(ASKED).encode()
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        head = f"POST /v1/answer HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        assert engine.started.wait(10)
        assert not engine.cancelled.is_set()
    assert engine.cancelled.wait(10)

    def scrape() -> str:
        return httpx.get(f"{url}/metrics", trust_env=False).text

    until(lambda: 'status="499"' in scrape(), "the request is not counted, though its handler has ended")
    text = scrape()
    assert "bertqa_requests_in_flight 1.0" in text  # the scrape itself


def test_the_deadline_is_the_shorter_of_ours_and_the_clients(make_app: MakeApp, engine: FakeEngine) -> None:
    deadlines = []

    async def predict(windows: object, *, deadline: float) -> list[object]:
        deadlines.append(deadline - time.monotonic())
        raise EngineTimeout("late")

    engine.predict = predict  # type: ignore[assignment,method-assign]
    with serving(make_app(deadline_s=5)) as url, httpx.Client(base_url=url, trust_env=False) as client:
        for wish in ({}, {"x-timeout-ms": "900"}, {"x-timeout-ms": "99999"}):
            problem(client.post("/v1/answer", json=ASKED, headers=wish), 504, "engine_timeout")
        assert [round(seconds) for seconds in deadlines] == [5, 1, 5]
        for nonsense in ("0", "-1", "soon", "1e3", "9" * 30):
            response = client.post("/", json={"inputs": ASKED}, headers={"x-timeout-ms": nonsense})
            problem(response, 422, "validation", "x-timeout-ms")


def request_until(gone: "asyncio.Future[None]") -> Request:
    return Request({"type": "http", "headers": [], "extensions": {GONE: gone}})


def test_work_ends_when_the_client_goes_and_its_task_goes_on() -> None:
    async def scenario() -> list[str]:
        gone = asyncio.get_running_loop().create_future()
        said = []

        async def work() -> None:
            try:
                await asyncio.sleep(60)
            finally:
                await asyncio.sleep(0)
                said.append("the work has ended")

        asyncio.get_running_loop().call_later(0.01, gone.set_result, None)
        try:
            await unless_gone(request_until(gone), work())
        except ClientDisconnect:
            said.append("gone")
        await asyncio.sleep(0.01)  # a cancellation that was left over would come here
        return said

    assert asyncio.run(scenario()) == ["the work has ended", "gone"]


def test_a_client_that_goes_when_the_work_is_done_harms_nothing() -> None:
    async def scenario() -> str:
        gone = asyncio.get_running_loop().create_future()

        async def work() -> str:
            gone.set_result(None)  # whose callbacks run in the next turn of the loop
            return "done"

        result = await unless_gone(request_until(gone), work())
        await asyncio.sleep(0.01)
        return result

    assert asyncio.run(scenario()) == "done"


def test_whoever_cancels_the_request_itself_is_told_so() -> None:
    async def scenario() -> None:
        gone = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(unless_gone(request_until(gone), asyncio.sleep(60)))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scenario())
