"""The command line against a service with the toy engine; the whole product is in test_end_to_end.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bertqa.squad import Example, Reference, as_squad
from tests.support.paths import ROOT


def bertqa(*words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "bertqa.cli", *words]
    return subprocess.run(command, input=stdin, capture_output=True, cwd=ROOT, timeout=60, check=False)


def test_a_proxy_for_the_web_is_not_asked_for_this_machine(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    done = bertqa("ask", "Who made it?", "--context", "-", "--url", url, stdin="It was made by «Uber».".encode())
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().split() == ["1.000", "16-20", "Uber"]


def test_offsets_count_the_file_as_it_is(url: str, tmp_path: Path) -> None:
    raw = "Horovod\r\n\r\n«Uber»\r\n".encode()
    (tmp_path / "text.txt").write_bytes(raw)
    for source in ("-", str(tmp_path / "text.txt")):
        reply = json.loads(bertqa("ask", "who?", "--context", source, "--url", url, "--json", stdin=raw).stdout)
        (answer,) = reply["answers"]
        assert raw.decode()[answer["start"] : answer["end"]] == answer["text"] == "Uber"


def test_what_is_not_utf_8_or_out_of_range_is_said_plainly(url: str, tmp_path: Path) -> None:
    binary = bertqa("ask", "who?", "--context", "-", "--url", url, stdin=b"\xff")
    assert (binary.returncode, binary.stderr.count(b"\n")) == (2, 1)
    assert b"--context -: 'utf-8' codec can't decode" in binary.stderr
    small = tmp_path / "small.json"
    small.write_text(json.dumps(as_squad([Example("1", "t", "who?", "Uber", (Reference("Uber", 0),))])))
    for flag in ("--concurrency", "--limit"):
        refused = bertqa("evaluate", "--data", str(small), "--url", url, flag, "0")
        assert refused.returncode == 2
        assert f"{flag}: must be at least 1, not 0".encode() in refused.stderr
