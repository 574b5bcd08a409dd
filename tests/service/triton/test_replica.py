"""One address of Triton: TLS, names with several addresses, and a wall clock that jumps."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from tritonclient.grpc import service_pb2_grpc

from bertqa.windows import OUTPUT_NAMES
from service.settings import Settings
from service.triton.channels import Channels
from service.triton.client import TritonEngine
from service.triton.errors import EngineTimeout, EngineUnavailable
from service.triton.replica import tls_credentials
from tests.support.certificates import certificates, tls_flags
from tests.support.fake_triton import FakeTriton, Moody, reply, served
from tests.support.name_server import Names
from tests.support.toy_triton import assert_right, run, soon, window
from tests.support.triton_servers import triton_with


@pytest.mark.parametrize(("jump", "mood"), [(3600, "well"), (-3600, "silent")])
def test_the_wall_clock_may_jump_while_a_call_is_made(monkeypatch: pytest.MonkeyPatch, jump: int, mood: str) -> None:
    # What Python reads of the clock is from before the jump; what gRPC's core reads, a moment later, from after it.
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - jump)

    async def scenario() -> None:
        fake = Moody()
        fake.mood = mood
        async with served(fake) as [url]:
            channels = Channels([url])
            model = channels.engine()
            asked = asyncio.wait_for(model.predict([window()], deadline=soon(0.5 if mood == "silent" else 5)), 10)
            if mood == "silent":
                with pytest.raises(EngineTimeout):
                    await asked
            else:
                assert_right([window()], await asked)
            await channels.close()

    asyncio.run(scenario())


@pytest.mark.triton
@pytest.mark.parametrize("mutual", [False, True], ids=["tls", "mutual"])
def test_tls_to_triton(tmp_path: Path, repository: Path, mutual: bool) -> None:
    files = certificates(tmp_path)

    def credentials(ca: str, own: str = "") -> Any:
        pair = (str(files / f"{own}.pem"), str(files / f"{own}.key")) if own else ()
        return tls_credentials(str(files / f"{ca}.pem"), *pair)

    async def answered(model: TritonEngine) -> None:
        assert_right([window()] * 3, await model.predict([window()] * 3, deadline=soon()))

    async def refused(model: TritonEngine) -> None:
        with pytest.raises(EngineUnavailable):
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
    channels = Channels([url])
    model = channels.engine()
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
        await channels.close()


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
            channels = Channels([f"{name}:{port}"])
            model = channels.engine()
            await model.predict([window()], deadline=soon(5))
            names.addresses = ("127.0.0.2",)
            await old.server.stop(None)
            await new.start("127.0.0.2", port)
            end = soon(15)  # gRPC's own pause between two questions to a name server is 30 s
            while not new.requests:
                assert time.monotonic() < end, "waited in vain"
                with contextlib.suppress(EngineUnavailable):
                    await model.predict([window()], deadline=soon(5))
            await channels.close()
        await new.server.stop(None)

    asyncio.run(scenario())
