"""Fixtures that several files share: a Triton with the toy model, and a service with API keys."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI

from service.api_keys import new_key
from service.runtime.triton_process import EmbeddedTriton
from tests.support.ports import triton_ports
from tests.support.servers import serving
from tests.support.toy_triton import write_repository

MakeApp = Callable[..., FastAPI]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_repository(tmp_path_factory.mktemp("repository"))


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedTriton]:
    with EmbeddedTriton(repository, ports=triton_ports(), log_dir=tmp_path_factory.mktemp("logs")) as started:
        yield started


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    return tmp_path / "keys"


@pytest.fixture
def key(keys_file: Path) -> str:
    return new_key(keys_file, "team-a", None, None)


@pytest.fixture
def guarded(make_app: MakeApp, keys_file: Path, key: str) -> Iterator[str]:
    with serving(make_app(api_keys_file=str(keys_file))) as url:
        yield url
