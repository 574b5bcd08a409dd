"""The load tests' sleeping engine, inside a real Triton."""

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import pytest

from bertqa.manifest import MANIFEST_FILE, MODEL_NAME, TOKENIZER_FILE, Bundle, BundleMismatch, changed_files, sha256_of
from bertqa.repository import Repository
from bertqa.spans import Decoded, decode
from loadtest.sleeping_engine import write_repository
from service.runtime.ports import TritonPorts
from service.runtime.triton_process import EmbeddedTriton
from service.triton import TritonModel


def test_it_sleeps_and_answers_with_the_first_word(bundle: Bundle, tmp_path: Path) -> None:
    source = tmp_path / "source" / MODEL_NAME / "1"
    source.mkdir(parents=True)
    (source / TOKENIZER_FILE).write_text(bundle.maker.tokenizer_json())
    replace(bundle.manifest, tokenizer_sha256=sha256_of(source / TOKENIZER_FILE)).write(source / MANIFEST_FILE)
    root = tmp_path / "sleeping"
    for seconds in (1.0, 0.05):  # the second replaces the first
        write_repository(root, source=tmp_path / "source", seconds=seconds, instances=2)
    repository = Repository(root)
    served = repository.open()
    assert served.manifest.name == "sleeping-50ms"
    assert repository.is_configured(MODEL_NAME)
    assert changed_files(repository.directory(MODEL_NAME, 1), served.manifest) == []
    windows = served.maker("who?", "made by uber. " * 20)
    assert len(windows.windows) > 1

    async def ask(url: str) -> tuple[Decoded, float]:
        engine = TritonModel([url])
        try:
            parameters = await engine.model_parameters(deadline=time.monotonic() + 30)
            assert parameters["identity_1"] == served.manifest.identity
            began = time.monotonic()
            logits = await engine.predict(windows.windows, deadline=began + 30)
            return decode([windows], [logits]), time.monotonic() - began
        finally:
            await engine.close()

    with EmbeddedTriton(root, ports=TritonPorts(0, 0, 0), log_dir=tmp_path / "logs") as triton:
        decoded, seconds = asyncio.run(ask(triton.url))
    assert decoded.best is not None
    assert (decoded.best.text, decoded.best.start) == ("made", 0)
    assert seconds >= 0.05 * len(windows.windows) / 2


def test_it_needs_a_whole_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleMismatch, match="holds no built version"):
        write_repository(tmp_path / "sleeping", source=tmp_path, seconds=0.01, instances=1)
