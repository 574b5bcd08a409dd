"""Test the cleanup of temporary files, with real processes that were killed and that still run."""

import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.runtime.leftovers import SHARED_MEMORY, Claim, remove_leftovers
from tests.support.paths import ROOT

OWNER = """
import os, time
from service.runtime.leftovers import Claim
directory, shared = Claim.directory(), Claim.shared_memory()
(directory.path / "file").touch()
shared.path.with_name(shared.path.name + "_region").touch()
print(directory.path, shared.path, flush=True)
time.sleep(600)
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def owner(temporary: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that has claimed files; its first line names them."""
    with subprocess.Popen(
        [sys.executable, "-c", OWNER],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        process.kill()


def test_files_of_a_killed_process_are_removed_and_those_of_a_living_one_are_not(
    temporary: Path, owner: "subprocess.Popen[str]"
) -> None:
    assert owner.stdout
    directory, shared = map(Path, owner.stdout.readline().split())
    region = shared.with_name(shared.name + "_region")
    assert not {directory, shared} & {*remove_leftovers()}
    assert (directory / "file").exists()
    assert region.exists()
    owner.send_signal(signal.SIGKILL)
    owner.wait(30)
    assert region.exists()
    assert {directory, shared} <= {*remove_leftovers()}
    assert not directory.exists()
    assert not shared.exists()
    assert not region.exists()


def test_own_files_are_private_kept_and_removed(temporary: Path) -> None:
    directory, shared = Claim.directory(), Claim.shared_memory()
    assert stat.S_IMODE(directory.path.stat().st_mode) == 0o700
    assert stat.S_IMODE(shared.path.stat().st_mode) == 0o600
    region = SHARED_MEMORY / f"{shared.path.name}_region"
    region.touch()
    assert not {directory.path, shared.path} & {*remove_leftovers()}
    shared.clear()
    assert (region.exists(), shared.path.exists()) == (False, True)
    for claim in (directory, shared):
        claim.remove()
        claim.remove()
        assert not claim.path.exists()


def test_what_only_looks_like_a_leftover_is_left_alone(temporary: Path) -> None:
    (temporary / "elsewhere").mkdir()
    (temporary / "bertqa_1_0123abcd").symlink_to(temporary / "elsewhere")
    (temporary / "bertqa_notes").mkdir()
    os.mkfifo(temporary / "bertqa_1_0123abce")  # opening it must not wait for a writer
    assert not [path for path in remove_leftovers() if path.parent == temporary]
    assert len(list(temporary.iterdir())) == 4
