"""Test free, taken and held ports, with real sockets."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from service.runtime.ports import PortError, free_port, hold_port
from tests.support.paths import ROOT


def test_a_held_port_is_given_to_nobody_and_its_own_server_can_listen() -> None:
    with hold_port("127.0.0.1", 0, "--port") as held:
        port = held.getsockname()[1]
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        for _ in range(2):  # as a server that is restarted
            with socket.create_server(("127.0.0.1", port)):
                socket.create_connection(("127.0.0.1", port), timeout=5).close()


def test_many_held_ports_are_all_different() -> None:
    held = [hold_port("127.0.0.1", 0, "--port") for _ in range(200)]
    assert len({each.getsockname()[1] for each in held}) == 200
    for each in held:
        each.close()


def test_who_listens_on_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(
            PortError, match=rf"port {port} of 127\.0\.0\.1 is taken by process {os.getpid()} \(.+\); .*--port 0"
        ):
            hold_port("127.0.0.1", port, "--port")
        assert free_port("127.0.0.1", port) > port


def test_an_address_of_another_machine_is_named() -> None:
    with pytest.raises(PortError, match=r"192\.0\.2\.1: cannot listen there"):
        hold_port("192.0.2.1", 0, "--port")


@pytest.mark.parametrize("option", ["--port", "--triton-grpc-port"])
def test_a_port_given_by_hand_that_is_taken_is_an_error(tmp_path: Path, option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        other = ["--port=0"] if option != "--port" else []
        done = subprocess.run(
            [sys.executable, "-m", "service", *other, f"{option}={port}", f"--repository={tmp_path / 'none'}"],
            cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert done.returncode == 2
    assert f"error: port {port} of 127.0.0.1 is taken by process {os.getpid()} (" in done.stderr
    assert f"choose another one with {option}" in done.stderr
    assert not (tmp_path / "none").exists(), "nothing was built"


def test_with_a_triton_elsewhere_an_empty_repository_is_an_error_and_nothing_is_built(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "service", "--port=0", f"--repository={tmp_path / 'typo'}"]
    done = subprocess.run(
        [*command, "--triton-url=127.0.0.1:9"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert f"error: --repository {tmp_path / 'typo'}: has no model, and with --triton-url" in done.stderr
    assert not (tmp_path / "typo").exists(), "nothing was built"
