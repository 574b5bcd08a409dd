"""The launcher with real processes: they start in order, log as told, and end with it."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections import defaultdict
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from bertqa.manifest import Bundle, Manifest
from bertqa.repository import Repository
from bertqa.squad import Example, Reference, as_squad
from tests.support.bundles import CONTEXT
from tests.support.checkpoints import write_checkpoint
from tests.support.paths import ROOT
from tests.support.processes import processes_with
from tests.support.repositories import publish_toy_bundle
from tests.support.toy_triton import write_repository
from tests.support.waiting import until


def test_launcher_told_to_end_ends_the_engine_build_too(tmp_path: Path) -> None:
    builder = tmp_path / "engine_builder"
    builder.mkdir()
    (builder / "__init__.py").touch()
    (builder / "__main__.py").write_text("import sys, time; print('building', flush=True); time.sleep(600)")
    program = (
        "import sys; from pathlib import Path; from service.runtime import engine, launcher\n"
        "from service.commands.serve import ServeOptions\n"
        "engine.PROJECT = here = Path(sys.argv[1])\n"
        "sys.exit(launcher.launch(ServeOptions(port=0, repository=here, checkpoint=here)))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as launcher:
        try:
            assert launcher.stdout
            assert launcher.stdout.readline() == "building\n"
            launcher.send_signal(signal.SIGTERM)
            assert launcher.wait(30) == 0
        finally:
            launcher.kill()
    until(lambda: not processes_with(str(tmp_path)))


@pytest.mark.triton
def test_launcher_serves_and_ends_in_order(bundle: Bundle, tmp_path: Path) -> None:
    directory = publish_toy_bundle(Repository(tmp_path / "model_repository"), bundle, 1)
    write_repository(tmp_path / "model_repository", Manifest.read(directory / "manifest.json").identity)
    command = [sys.executable, "-m", "service", "--port=0", "--triton-grpc-port=0", f"--log-dir={tmp_path}"]
    with subprocess.Popen(
        [*command, f"--repository={directory.parent.parent}"],
        cwd=ROOT,
        env={**os.environ, "BERTQA_TRITON_TLS_CA": "/meant/for/another/triton.pem"},
        stderr=subprocess.PIPE,
        text=True,
    ) as launcher:
        try:
            assert launcher.stderr
            lines: list[str] = []
            for line in launcher.stderr:
                lines.append(line)
                if "ready at http://" in line:
                    break
            assert "ready at http://127.0.0.1:" in "".join(lines[-1:]), lines
            connection = http.client.HTTPConnection("127.0.0.1", int(lines[-1].rpartition(":")[2]), timeout=30)
            with closing(connection):
                connection.request("GET", "/health/ready")
                assert connection.getresponse().status == 200
            launcher.send_signal(signal.SIGINT)
            assert launcher.wait(60) == 0
        finally:
            launcher.kill()
    until(lambda: not processes_with(str(tmp_path)))


@pytest.mark.triton
def test_every_line_of_the_launcher_and_its_children_is_json(tmp_path: Path) -> None:
    """The builder's, the service's, and those of gRPC's core, which knows no log."""
    checkpoint = write_checkpoint(tmp_path / "tiny")
    examples = [Example("a", "t", "Who wrote it?", CONTEXT, (Reference("Ada", CONTEXT.index("Ada")),))]
    (checkpoint / "gate.json").write_text(json.dumps(as_squad(examples)))
    command = [sys.executable, "-m", "service", "--port=0", "--triton-grpc-port=0", f"--log-dir={tmp_path}"]
    command += [f"--repository={tmp_path / 'models'}", f"--checkpoint={checkpoint}"]
    environment = {"BERTQA_LOG_FORMAT": "json", "GRPC_VERBOSITY": "debug", "BERTQA_LOG_TEXTS": ""}
    with (
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}, stdout=log, stderr=log) as launcher,
    ):
        try:
            until(
                lambda: launcher.poll() is not None or b"ready at http://" in (tmp_path / "log").read_bytes(),
                seconds=120,
            )
            (url,) = re.findall(r"ready at (http://[\d.:]+)", (tmp_path / "log").read_text())
            assert httpx.get(f"{url}/info", trust_env=False).status_code == 200
            launcher.send_signal(signal.SIGTERM)
            assert launcher.wait(60) == 0
        finally:
            launcher.kill()
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    said: dict[str, list[str]] = defaultdict(list)
    for line in lines:
        assert line.keys() >= {"time", "level", "logger", "message"}
        said[line["logger"]].append(line["message"])
    assert said["bertqa.launcher"][-1] == "ended"
    assert any("built in" in message for message in said["bertqa.builder"])
    assert not any("it/s" in message or "\r" in message for message in said["bertqa.builder"]), "no bars"
    assert said["bertqa.access"] == ["GET /info 200"]
    assert any(re.match(r"[IDEW]\d{4} ", message) for message in said["bertqa.output"]), said["bertqa.output"][:5]
