"""Test the load tests' sleeping engine in a real Triton."""

import asyncio
import time
from pathlib import Path

import pytest

from bertqa.manifest import MODEL_NAME, Bundle, BundleMismatch, changed_files
from bertqa.repository import Repository
from bertqa.spans import Decoded, decode
from loadtest.sleeping_engine import write_repository
from service.runtime.triton_process import EmbeddedTriton
from service.triton.channels import Channels
from tests.support.ports import triton_ports
from tests.support.repositories import publish_toy_bundle


@pytest.mark.triton
def test_it_sleeps_and_answers_with_the_first_word(bundle: Bundle, tmp_path: Path) -> None:
    publish_toy_bundle(Repository(tmp_path / "source"), bundle, 1)
    root = tmp_path / "sleeping"
    for seconds in (1.0, 0.05):  # the second replaces the first
        write_repository(root, source=tmp_path / "source", seconds=seconds, instances=2)
    repository = Repository(root)
    served = repository.open()
    assert served.manifest.name == "sleeping-50ms"
    assert repository.is_configured(MODEL_NAME)
    assert changed_files(repository.directory(MODEL_NAME, 1), served.manifest) == []
    windows = served.tokenizer("who?", "made by uber. " * 20)
    assert len(windows.windows) > 1

    async def ask(url: str) -> tuple[Decoded, float]:
        channels = Channels([url])
        try:
            loaded = await channels.admin().loaded(deadline=time.monotonic() + 30)
            assert loaded.parameters["identity_1"] == served.manifest.identity
            began = time.monotonic()
            logits = await channels.engine().predict(windows.windows, deadline=began + 30)
            return decode([windows], [logits]), time.monotonic() - began
        finally:
            await channels.close()

    with EmbeddedTriton(root, ports=triton_ports(), log_dir=tmp_path / "logs") as triton:
        decoded, seconds = asyncio.run(ask(triton.url))
    assert decoded.best is not None
    assert (decoded.best.text, decoded.best.start) == ("made", 0)
    assert seconds >= 0.05 * len(windows.windows) / 2


def test_it_needs_a_whole_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleMismatch, match="holds no built version"):
        write_repository(tmp_path / "sleeping", source=tmp_path, seconds=0.01, instances=1)
