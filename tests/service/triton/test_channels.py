"""The connections to Triton, and which clients share a circuit."""

import asyncio

import pytest

from service.triton.channels import Channels
from tests.support.fake_triton import Moody, fail, served
from tests.support.toy_triton import soon, window


def test_bounds_are_checked() -> None:
    with pytest.raises(ValueError, match="urls"):
        Channels([])


def test_version_that_is_broken_leaves_the_one_before_alone() -> None:
    async def scenario() -> None:
        fake = Moody()
        async with served(fake) as [url]:
            channels = Channels([url])
            old = channels.engine(version=1)
            new = channels.engine(version=2)
            fake.mood = "nan"
            await fail(new, 10)
            fake.mood = "well"
            await old.predict([window()], deadline=soon(5))
            await channels.close()

    asyncio.run(scenario())
