"""Fixtures for all tests, and skips for tests whose requirements are missing."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # before numpy and torch are loaded: a worker has a core, not all of them
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import httpx
import hypothesis
import pytest
from fastapi import FastAPI

from bertqa.manifest import Bundle
from service.app import create_app
from service.settings import Settings
from tests.support.machine import machine
from tests.support.servers import serving
from tests.support.toy_model import FakeEngine, toy_bundle

# How long an example takes says something of the machine, and nothing of the code.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

MAY_BE_SKIPPED: frozenset[str] = frozenset()
"""Tests that may be skipped in CI, by node id; any other skip there fails the run."""

_SKIPPED: list[str] = []
_NOT_RUN: dict[str, list[str]] = {}
"""Tests that this machine cannot run, by what it lacks."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs a GPU or root where there is none; put the files with slow tests first."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)  # or one worker ends long after the others
    for marker, missing in (("gpu", _missing_gpu), ("root", _missing_root)):
        marked = [item for item in items if item.get_closest_marker(marker)]
        lacks = missing() if marked else ""
        if lacks:
            items[:] = [item for item in items if item not in marked]
            config.hook.pytest_deselected(items=marked)
            _NOT_RUN[lacks] = [item.nodeid for item in marked]


def _missing_gpu() -> str:
    from engine_builder.targets.tensorrt import missing_parts

    return ", ".join(missing_parts())


def _missing_root() -> str:
    return "" if os.geteuid() == 0 else "the rights of root"


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note what was skipped."""
    if report.skipped and not hasattr(report, "wasxfail"):
        _SKIPPED.append(report.nodeid)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tell xdist's main process what was not run, and fail in CI if a test was skipped."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["not_run"] = _NOT_RUN
    elif os.environ.get("CI") == "true" and set(_SKIPPED) - MAY_BE_SKIPPED and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what a worker of xdist did not run; each worker collects the same tests."""
    _NOT_RUN.update(getattr(node, "workeroutput", {}).get("not_run", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was not run, and why."""
    for missing, names in _NOT_RUN.items():
        terminalreporter.section(f"NOT RUN: {len(names)} tests, for this machine has not {missing}")
        for name in names:
            terminalreporter.line(f"not run: {name}")
    if os.environ.get("CI") == "true" and (skipped := set(_SKIPPED) - MAY_BE_SKIPPED):
        terminalreporter.section("SKIPPED, which CI does not allow")
        for name in sorted(skipped):
            terminalreporter.line(f"skipped: {name}")


@pytest.fixture(autouse=True)
def _place_on_the_machine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let a test that is marked `alone` wait for the tests of xdist's other workers, and them for it."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        yield
        return
    shared = tmp_path_factory.getbasetemp().parent
    with machine(shared, alone=request.node.get_closest_marker("alone") is not None):
        yield


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
