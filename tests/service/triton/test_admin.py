"""What start-up and probes ask of a model, against a real Triton."""

import asyncio

import pytest

from service.runtime.triton_process import EmbeddedTriton
from service.triton import replica
from service.triton.admin import Loaded
from service.triton.channels import Channels
from tests.support.toy_triton import soon, with_channels


@pytest.mark.triton
def test_ready_and_parameters(server: EmbeddedTriton) -> None:
    async def scenario(channels: Channels) -> None:
        await channels.admin().check_ready(deadline=soon())
        assert (await channels.admin().loaded(deadline=soon())).parameters == {"identity_1": "toy"}

    with_channels(server.url, scenario)


@pytest.mark.triton
def test_two_calls_for_each_instance_at_each_address(server: EmbeddedTriton) -> None:
    async def concurrency(channels: Channels) -> tuple[int, int]:
        admins = channels.admin(), channels.admin("bert_qa", 1)
        first, second = [await admin.loaded(deadline=soon()) for admin in admins]
        return first.concurrency, second.concurrency

    port = server.url.rpartition(":")[2]
    assert with_channels(server.url, concurrency) == (2, 2)
    assert with_channels(f"localhost:{port},dns:///127.0.0.1:{port}", concurrency) == (4, 4)


@pytest.mark.triton
def test_a_name_server_that_hangs_holds_up_no_question(server: EmbeddedTriton, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up: list[str] = []

    async def scenario(channels: Channels) -> None:
        answers = asyncio.Event()

        async def lookup(url: str) -> int:
            looked_up.append(url)
            await answers.wait()
            return 3

        monkeypatch.setattr(replica, "count_addresses", lookup)
        for _ in range(3):
            loaded = await channels.admin().loaded(deadline=soon())
            assert loaded == Loaded({"identity_1": "toy"}, 2)  # as for one address
        assert looked_up == [server.url], "one lookup at a time"
        answers.set()
        for _ in range(2):
            assert (await channels.admin().loaded(deadline=soon())).concurrency == 6
        assert looked_up == [server.url] * 2
        answers.clear()
        assert (await channels.admin().loaded(deadline=soon())).concurrency == 6
        await channels.close()  # leaves no lookup behind
        await asyncio.sleep(0)

    with_channels(server.url, scenario)
