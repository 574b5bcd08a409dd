"""The embedded Triton: it starts, starts again, ends without a trace, and says what is wrong."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import pytest

from service.runtime import triton_install
from service.runtime.ports import TritonPorts, free_port
from service.runtime.triton_install import TritonError, find_triton
from service.runtime.triton_process import EmbeddedTriton
from service.triton.client import TritonEngine
from service.triton.errors import EngineBroken, EngineUnavailable
from tests.support.paths import ROOT
from tests.support.ports import triton_ports
from tests.support.processes import processes_with, shared_memory
from tests.support.toy_triton import (
    CRASH,
    assert_right,
    run,
    soon,
    until_answered,
    window,
    with_channels,
    write_repository,
)
from tests.support.waiting import until


@pytest.mark.triton
def test_model_whose_process_dies_is_started_again(repository: Path, tmp_path: Path) -> None:
    said: list[str] = []

    async def scenario(model: TritonEngine) -> None:
        with pytest.raises((EngineBroken, EngineUnavailable)):
            await model.predict([window(CRASH)], deadline=soon())
        while not any("died; see" in line for line in said):
            await asyncio.sleep(0.1)
        await until_answered(model)

    with EmbeddedTriton(repository, ports=triton_ports(), log_dir=tmp_path, report=said.append) as server:
        run(server.url, scenario)


@pytest.mark.triton
def test_paths_with_spaces(tmp_path: Path) -> None:
    directory = tmp_path / "it's my project"
    spaced = write_repository(directory / "model repository")
    with EmbeddedTriton(spaced, ports=triton_ports(), log_dir=directory / "the logs", ready_timeout_s=60) as server:
        assert with_channels(server.url, lambda channels: channels.admin().loaded(deadline=soon())).parameters == {
            "identity_1": "toy"
        }
        assert server.log_file.stat().st_size


@pytest.mark.triton
def test_logs_that_cannot_be_written_are_named(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        TritonError, match=r"file/logs: cannot create the log directory \(Not a directory\); choose another"
    ):
        EmbeddedTriton(repository, ports=triton_ports(), log_dir=tmp_path / "file" / "logs").start()


@pytest.mark.triton
def test_killed_server_is_restarted_and_two_live_side_by_side(repository: Path, tmp_path: Path) -> None:
    said: list[str] = []
    before = shared_memory()  # of the server that other tests share
    with (
        EmbeddedTriton(repository, ports=triton_ports(), log_dir=tmp_path) as other,
        EmbeddedTriton(repository, ports=other.ports, log_dir=tmp_path, report=said.append) as killed,
    ):
        assert not {killed.ports.grpc, killed.ports.http} & {other.ports.grpc, other.ports.http}
        assert any(f"grpc port {other.ports.grpc} is taken, using {killed.ports.grpc}" in line for line in said)
        first = killed.pid

        async def scenario(model: TritonEngine) -> None:
            await model.predict([window()], deadline=soon())
            assert first
            os.kill(first, signal.SIGKILL)
            while killed.pid in (None, first):
                await asyncio.sleep(0.05)
            await until_answered(model)  # the same client finds the new server

        run(killed.url, scenario)
        assert any("killed by SIGKILL" in line and "restarting" in line for line in said)
        assert_right([window()], run(other.url, lambda model: model.predict([window()], deadline=soon())))
        pids = [process for process in (killed.pid, other.pid) if process]
    assert not any(Path(f"/proc/{process}").exists() for process in pids)
    assert shared_memory() <= before


@pytest.mark.triton
def test_port_taken_by_something_else(repository: Path, tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        taken = listener.getsockname()[1]
        assert free_port("127.0.0.1", taken) > taken
        assert free_port("127.0.0.1", taken, avoid=range(taken, taken + 5)) > taken + 4
        with EmbeddedTriton(repository, ports=TritonPorts(taken, 0, 0), log_dir=tmp_path) as moved:
            assert moved.ports.grpc > taken
            assert moved.log_file.name == f"triton-{moved.ports.grpc}.log"


@pytest.mark.triton
def test_model_that_cannot_be_loaded_gives_the_reason(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = write_repository(tmp_path / "broken")
    (broken / "bert_qa" / "config.pbtxt").write_text('name: "bert_qa" bakcend: "python"')
    with pytest.raises(TritonError, match=r"could not be loaded|ended with exit code 1 \(.*bakcend"):
        EmbeddedTriton(broken, ports=triton_ports(), log_dir=tmp_path).start()
    monkeypatch.setenv("TOY_MODEL_FAILS", "1")
    with pytest.raises(TritonError, match=r"could not be loaded: .*engine\.bin is not there.*; see .*\.log"):
        EmbeddedTriton(repository, ports=triton_ports(), log_dir=tmp_path).start()


@pytest.mark.triton
def test_start_that_takes_too_long_is_given_up(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(TritonError, match="is not ready after 0 s"):
        EmbeddedTriton(repository, ports=triton_ports(), log_dir=tmp_path, ready_timeout_s=0).start()


@pytest.mark.triton
def test_what_is_missing_is_named_with_its_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TritonError, match=r"holds no built version; run .*engine_builder"):
        EmbeddedTriton(tmp_path, log_dir=tmp_path).start()
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(triton_install, "_PYTHON", "3.7")
    with pytest.raises(TritonError, match=r"with Python 3\.8, 3\.9, 3\.10.* this is Python 3\.7"):
        find_triton(tmp_path / "cache")
    monkeypatch.setattr(triton_install, "WHEEL", "no-such-wheel")
    with pytest.raises(TritonError, match="pip install --no-deps"):
        find_triton(tmp_path / "cache")


@pytest.mark.triton
def test_nothing_outlives_a_launcher_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = write_repository(tmp_path / "repository")
    program = (
        "import sys, time; from pathlib import Path\n"
        "from service.runtime.ports import TritonPorts\nfrom service.runtime.triton_process import EmbeddedTriton\n"
        "triton = EmbeddedTriton(Path(sys.argv[1]), ports=TritonPorts(0, 0, 0), log_dir=Path(sys.argv[2]))\n"
        "triton.start(); time.sleep(600)"
    )
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", program, str(repository), str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
    ) as launcher:
        until(lambda: len(processes_with(str(repository))) >= 3 or launcher.poll() is not None)  # + server and stub
        launcher.kill()
    until(lambda: not processes_with(str(repository)))
    left = {*Path("/dev/shm").glob(f"bertqa_{launcher.pid}_*"), *temporary.iterdir()}
    assert {path.parent for path in left} == {Path("/dev/shm"), temporary}, "nobody was there to remove them"
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    with EmbeddedTriton(repository, ports=triton_ports(), log_dir=tmp_path):  # the next start
        assert not any(path.exists() for path in left)
