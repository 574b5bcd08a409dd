"""A Triton with the toy model, one for each file of tests that needs it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from service.runtime.triton_process import EmbeddedTriton
from tests.support.ports import triton_ports
from tests.support.toy_triton import write_repository


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_repository(tmp_path_factory.mktemp("repository"))


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedTriton]:
    with EmbeddedTriton(repository, ports=triton_ports(), log_dir=tmp_path_factory.mktemp("logs")) as started:
        yield started
