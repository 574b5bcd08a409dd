"""API keys: their file, their rates, and the command that makes them."""

import hashlib
import json
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st

from service.api_keys import PREFIX, Key, Keyring, KeysError, new_key, parse_keys, revoke_key
from tests.support.key_clients import connect
from tests.support.paths import ROOT
from tests.support.servers import serving

MakeApp = Callable[..., FastAPI]


@given(st.floats(0.1, 1000), st.floats(1, 50), st.lists(st.floats(0, 5), min_size=1, max_size=60))
def test_a_bucket_never_gives_more_than_its_burst_and_its_rate(rate: float, burst: float, pauses: list[float]) -> None:
    now = 1000.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: now)
        key = Key("k", b"", rate, burst)
        began, given_out = now, 0
        for pause in pauses:
            now += pause
            wait_s = key.take()
            given_out += not wait_s
            assert given_out <= burst + (now - began) * rate + 1e-6
            if wait_s:
                now += wait_s * (1 + 1e-9) + 1e-9
                assert key.take() == 0, "after the wait that was told there is one"
                given_out += 1


def test_a_changed_file_is_read_again_and_a_broken_one_is_not_taken(
    guarded: str, key: str, keys_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def until(status: int, client: httpx.Client) -> None:
        end = time.monotonic() + 20
        while client.get("/info").status_code != status:
            assert time.monotonic() < end
            time.sleep(0.05)

    with connect(guarded, key) as old:
        added = new_key(keys_file, "team-b", None, None)
        with connect(guarded, added) as new:
            until(200, new)
            whole = keys_file.read_text()
            keys_file.write_text("team-a zzz - -\n")
            end = time.monotonic() + 20
            while "the previous keys stay valid" not in caplog.text:
                assert time.monotonic() < end
                time.sleep(0.05)
            assert "line 1" in caplog.text
            assert old.get("/info").status_code == new.get("/info").status_code == 200
            keys_file.unlink()
            time.sleep(1.2)
            assert old.get("/info").status_code == 200
            keys_file.write_text("".join(line for line in whole.splitlines(True) if not line.startswith("team-a")))
            until(401, old)
            assert new.get("/info").status_code == 200


def test_a_file_that_is_being_written_locks_nobody_out(
    guarded: str, key: str, keys_file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = keys_file.read_text()
    with connect(guarded, key) as client:
        keys_file.write_text("")  # as an editor does that truncates first
        end = time.monotonic() + 20
        while "is empty, as if it were being written; the previous keys stay valid" not in caplog.text:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert client.get("/info").status_code == 200
        keys_file.write_text("# nobody for now\n" + whole.replace("team-a", "# team-a"))
        while client.get("/info").status_code != 401:
            assert time.monotonic() < end
            time.sleep(0.05)
        keys_file.write_text(whole)
        while client.get("/info").status_code != 200:
            assert time.monotonic() < end
            time.sleep(0.05)


@pytest.mark.parametrize("unit", ["windows", "question question", "bertqa_secret"])
def test_a_unit_that_is_none_is_refused_and_not_quoted(keys_file: Path, unit: str) -> None:
    keys_file.write_text(f"a {'00' * 32} 1 1 {unit}\n")
    with pytest.raises(KeysError, match="UNIT must be one of request, question, window") as error:
        Keyring(keys_file)
    assert "secret" not in str(error.value)


def test_a_key_that_stays_keeps_what_it_has_spent(keys_file: Path) -> None:
    key = new_key(keys_file, "slow", 0.01, 1)
    ring = Keyring(keys_file)
    found = ring.find(key.encode())
    assert found
    assert found.take() == 0
    new_key(keys_file, "other", None, None)
    ring.reload()
    assert ring.find(key.encode()) is found
    assert found.take() > 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a b", "line 1: must be NAME SHA256 RATE BURST"),
        ("\n\na " + "0" * 63 + " - -", "line 3"),
        ("a " + "00" * 31 + " - -", "64 hexadecimal digits"),
        ("a " + "00" * 32 + " 0 1", "RATE must be above 0"),
        ("a " + "00" * 32 + " nan 1", "RATE must be above 0"),
        ("a " + "00" * 32 + " inf 1", "RATE must be above 0"),
        ("a " + "00" * 32 + " 1 0.5", "BURST at least 1"),
        ("a " + "00" * 32 + " - 5", "line 1"),
        ("a/b " + "00" * 32 + " - -", "begin with a name"),
        ("a " + "00" * 32 + " - -\na " + "11" * 32 + " - -", "line 2: the name or key is a duplicate"),
        ("a " + "00" * 32 + " - -\nb " + "00" * 32 + " - -", "line 2: the name or key is a duplicate"),
    ],
)
def test_lines_that_are_wrong_are_named(keys_file: Path, text: str, said: str) -> None:
    keys_file.write_text(text)
    with pytest.raises(KeysError, match=said) as error:
        Keyring(keys_file)
    assert str(keys_file) in str(error.value)


def test_a_file_that_cannot_be_read_is_refused_at_the_start(tmp_path: Path, make_app: MakeApp) -> None:
    with pytest.raises(KeysError, match="cannot be read"):
        make_app(api_keys_file=str(tmp_path / "none"))
    (tmp_path / "latin").write_bytes(b"\xff")
    with pytest.raises(KeysError, match="cannot be read"):
        make_app(api_keys_file=str(tmp_path / "latin"))


def keys_command(*arguments: str, file: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "bertqa.cli", "keys", *arguments, "--file", str(file)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_the_command_makes_keys_and_lists_them(keys_file: Path) -> None:
    made = keys_command("new", "team-a", "--rate", "5", file=keys_file)
    key = made.stdout.strip()
    assert made.returncode == 0
    assert key.startswith(PREFIX)
    assert len(key) == len(PREFIX) + 43  # 256 bits in base64
    assert keys_file.read_text() == f"team-a {hashlib.sha256(key.encode()).hexdigest()} 5 10\n"
    assert stat.S_IMODE(keys_file.stat().st_mode) == 0o600
    keys_file.write_text("# ours\n" + keys_file.read_text().rstrip("\n"))  # as an editor may leave it
    assert keys_command("new", "b", file=keys_file).returncode == 0
    assert keys_command("list", file=keys_file).stdout == "team-a  5 requests per second, 10 at once\nb  no limit\n"
    assert parse_keys(keys_file).keys() == {"team-a", "b"}
    for arguments, code, said in (
        (("new", "b"), 1, "already has a key b"),
        (("new", "b c"), 1, "NAME: must be"),
        (("new", "c", "--rate", "0"), 2, "'--rate': must be above 0"),
        (("new", "c", "--burst", "2"), 2, "--burst: needs --rate"),
        (("new", "c", "--rate", "1", "--burst", "0.5"), 1, "BURST at least 1"),
    ):
        refused = keys_command(*arguments, file=keys_file)
        assert refused.returncode == code
        assert said in refused.stderr
    assert parse_keys(keys_file).keys() == {"team-a", "b"}
    listed = json.loads(keys_command("list", "--format", "json", file=keys_file).stdout)
    team = {"name": "team-a", "rate": 5.0, "burst": 10.0, "per": "request"}
    assert listed == [team, {"name": "b", "rate": None, "burst": None, "per": "request"}]


def test_a_revoked_key_is_refused_and_all_else_stays(make_app: MakeApp, keys_file: Path, key: str) -> None:
    (name,) = parse_keys(keys_file)
    other = new_key(keys_file, "other", None, None)
    before = f"# {name} is of the first team\n\n" + keys_file.read_text().replace("- -\n", "- -  # until May\n", 1)
    keys_file.write_text(before + "# the end")
    keys_file.chmod(0o640)
    link = keys_file.with_name("link")
    link.symlink_to(keys_file)
    with serving(make_app(api_keys_file=str(keys_file))) as url, connect(url, key) as client:
        assert client.get("/info").status_code == 200
        done = keys_command("revoke", name, file=link)
        assert done.returncode == 0, done.stderr
        end = time.monotonic() + 10
        while client.get("/info").status_code == 200:
            assert time.monotonic() < end, "the key is still accepted"
            time.sleep(0.05)
        assert client.get("/info").status_code == 401
        with connect(url, other) as still:
            assert still.get("/info").status_code == 200
    lines = before.splitlines(keepends=True)
    assert keys_file.read_text() == "".join(each for each in lines if not each.startswith(f"{name} ")) + "# the end"
    assert stat.S_IMODE(keys_file.stat().st_mode) == 0o640
    assert link.is_symlink()
    assert sorted(path.name for path in keys_file.parent.iterdir()) == sorted([keys_file.name, "link"])
    again = keys_command("revoke", name, file=keys_file)
    assert (again.returncode, again.stderr.count("\n")) == (1, 1)
    assert f"has no key '{name}'" in again.stderr


def test_keys_made_and_revoked_at_the_same_time_are_all_there_or_gone(keys_file: Path) -> None:
    for number in range(15):
        new_key(keys_file, f"old-{number}", None, None)
    with ThreadPoolExecutor(8) as pool:
        made = [pool.submit(new_key, keys_file, f"new-{number}", None, None) for number in range(15)]
        gone = [pool.submit(revoke_key, keys_file, f"old-{number}") for number in range(15)]
        assert len([each.result() for each in made]) == len([each.result() for each in gone])
    names = parse_keys(keys_file).keys()
    assert {name for name in names if name.startswith("new-")} == {f"new-{number}" for number in range(15)}
    assert not [name for name in names if name.startswith("old-")]
