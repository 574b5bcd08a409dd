"""Fixtures of every test, and what is not run where something is missing."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import hypothesis
import pytest
from fastapi import FastAPI

from bertqa.manifest import Bundle
from service.app import create_app
from service.settings import Settings
from tests.support.servers import serving
from tests.support.toy_model import FakeEngine, toy_bundle

# How long an example takes says something of the machine, and nothing of the code.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

_NOT_RUN: dict[str, list[str]] = {}
"""By what is missing."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs a GPU where there is none; the summary lists it."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    from engine_builder.tensorrt_build import missing_parts

    if missing := missing_parts():
        items[:] = [item for item in items if item not in marked]
        config.hook.pytest_deselected(items=marked)
        _NOT_RUN[", ".join(missing)] = [item.nodeid for item in marked]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was not run, and why."""
    for missing, names in _NOT_RUN.items():
        terminalreporter.section(f"NOT RUN: {len(names)} tests, for this machine has not {missing}")
        for name in names:
            terminalreporter.line(f"not run: {name}")


@pytest.fixture(scope="session")
def bundle() -> Bundle:
    return toy_bundle()


@pytest.fixture
def engine(bundle: Bundle) -> FakeEngine:
    return FakeEngine(bundle.manifest.identity)


@pytest.fixture
def make_app(bundle: Bundle, engine: FakeEngine) -> Callable[..., FastAPI]:
    """Makes the real application with the toy bundle and engine; keyword arguments are `Settings`."""

    def make(**settings: object) -> FastAPI:
        return create_app(Settings(**settings), engine=engine, bundle=bundle)  # type: ignore[arg-type]

    return make


@pytest.fixture
def url(make_app: Callable[..., FastAPI]) -> Iterator[str]:
    with serving(make_app()) as base_url:
        yield base_url


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=30, trust_env=False) as http:
        yield http


@pytest.fixture(scope="session")
def javascript_packages() -> Path:
    """The folder with the npm packages of the tests, installed as its lock file says."""
    folder = Path(__file__).parent / "javascript"
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.fail("node and npm are needed: apt-get install nodejs npm")
    lock, installed = folder / "package-lock.json", folder / "node_modules" / ".package-lock.json"
    if not installed.exists() or installed.stat().st_mtime < lock.stat().st_mtime:
        done = subprocess.run(["npm", "ci"], cwd=folder, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def shared_client(bundle: Bundle) -> Iterator[httpx.Client]:
    """A client of one server for all tests that leave its engine as it is."""
    app = create_app(Settings(), engine=FakeEngine(bundle.manifest.identity), bundle=bundle)
    with serving(app) as base_url, httpx.Client(base_url=base_url, timeout=30, trust_env=False) as http:
        yield http
