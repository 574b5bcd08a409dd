"""Who may ask: API keys over real HTTP, their file, their rates, and what browsers are told."""

import hashlib
import json
import logging
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest
from fastapi import FastAPI
from huggingface_hub import InferenceClient
from hypothesis import given
from hypothesis import strategies as st

from service.keys import PREFIX, Key, Keyring, KeysError, Unit, new_key, parse_keys, revoke_key
from service.settings import Settings
from tests.support.asking import ASKED, problem
from tests.support.paths import ROOT
from tests.support.servers import serving

MakeApp = Callable[..., FastAPI]


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    return tmp_path / "keys"


def connect(url: str, key: str = "") -> httpx.Client:
    return httpx.Client(
        base_url=url, trust_env=False, timeout=30, headers={"authorization": f"Bearer {key}"} if key else {}
    )


@pytest.fixture
def key(keys_file: Path) -> str:
    return new_key(keys_file, "team-a", None, None)


@pytest.fixture
def guarded(make_app: MakeApp, keys_file: Path, key: str) -> Iterator[str]:
    with serving(make_app(api_keys_file=str(keys_file))) as url:
        yield url


def test_only_a_known_key_is_answered_and_health_is_open(guarded: str, key: str) -> None:
    with connect(guarded) as client:
        strange: list[dict[str, str | bytes]] = [
            {},
            {"authorization": "Bearer"},
            {"authorization": f"Bearer {PREFIX}{'A' * 43}"},
            {"authorization": f"Bearer {key[:-1]}"},
            {"authorization": f"Bearer {key} {key}"},
            {"authorization": f"Basic {key}"},
            {"x-api-key": key.upper()},
            {"x-api-key": "ключ".encode()},
            {"x-api-key": "x" * 10_000},
        ]
        for headers in strange:
            for method, path in (("POST", "/v1/answer"), ("POST", "/"), ("GET", "/info"), ("GET", "/no/such/path")):
                response = client.request(method, path, headers=headers)  # type: ignore[arg-type]  # bytes too
                said = problem(response, 401, "unauthorized")
                assert response.headers["www-authenticate"] == 'Bearer realm="bertqa"'
                assert key[8:20] not in said
        for known in ({"authorization": f"Bearer {key}"}, {"authorization": f"bearer  {key}"}, {"x-api-key": key}):
            assert client.post("/v1/answer", json=ASKED, headers=known).status_code == 200
            assert client.get("/info", headers=known).status_code == 200
        for path in ("/", "/health/live", "/health/ready", "/static/page.js", "/metrics", "/docs", "/openapi.json"):
            assert client.get(path).status_code == 200, path
        paths = client.get("/openapi.json").json()["paths"]
        assert paths["/info"]["get"]["security"] == paths["/"]["post"]["security"] == [{"api_key": []}]
        assert "security" not in paths["/"]["get"]
        problem(client.post("/health/live"), 401, "unauthorized")
        text = client.get("/metrics").text
    assert 'bertqa_key_requests_total{key="team-a",outcome="accepted"} 6.0' in text
    assert 'bertqa_errors_total{error_type="unauthorized"} 37.0' in text
    assert key[8:20] not in text


def test_the_hugging_face_client_sends_the_key_as_its_token(guarded: str, key: str) -> None:
    answered = InferenceClient(guarded, token=key).question_answering(
        question=ASKED["question"], context=ASKED["context"]
    )
    assert (answered[0] if isinstance(answered, list) else answered)["answer"] == "Uber"


def test_without_a_file_a_token_is_ignored(make_app: MakeApp) -> None:
    # The Hugging Face client sends one that is saved on the machine, whether asked to or not.
    with serving(make_app()) as url, connect(url, "hf_saved_long_ago") as client:
        assert client.post("/v1/answer", json=ASKED).status_code == 200
        assert "security" not in client.get("/openapi.json").text


def test_no_key_is_logged(
    guarded: str, key: str, keys_file: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    wrong = PREFIX + "w" * 43
    with caplog.at_level(logging.DEBUG), connect(guarded, key) as client, connect(guarded, wrong) as stranger:
        assert client.post("/v1/answer", json=ASKED).status_code == 200
        stranger.post("/v1/answer", json=ASKED)
        stranger.get("/health/ready")
        keyring = Keyring(keys_file)
        for line in (key, f"a {key} - -", f"a {'0' * 64} {key} 1", f"{key}/ {'0' * 64} - -"):  # put in the wrong place
            keys_file.write_text(line)
            keyring.reload()
    assert caplog.text.count("the keys from before stay valid") >= 4
    logged = caplog.text + "".join(capfd.readouterr())
    assert key[8:20] not in logged
    assert wrong[8:20] not in logged


def test_each_key_has_its_own_rate(make_app: MakeApp, keys_file: Path) -> None:
    slow, fast = new_key(keys_file, "slow", 0.01, 3), new_key(keys_file, "fast", None, None)
    with serving(make_app(api_keys_file=str(keys_file))) as url, connect(url, slow) as one, connect(url, fast) as other:
        assert [one.get("/info").status_code for _ in range(5)] == [200] * 3 + [429] * 2
        response = one.post("/v1/answer", json=ASKED)
        assert "slow has 0.01 requests a second" in problem(response, 429, "rate_limited")
        assert 90 <= int(response.headers["retry-after"]) <= 100
        assert other.post("/v1/answer", json=ASKED).status_code == 200
        assert 'bertqa_key_requests_total{key="slow",outcome="limited"} 3.0' in other.get("/metrics").text


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
            while "the keys from before stay valid" not in caplog.text:
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
        while "holds nothing, as if it were being written; the keys from before stay valid" not in caplog.text:
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


def test_a_rate_may_count_questions_or_windows(make_app: MakeApp, keys_file: Path) -> None:
    keys = {unit: new_key(keys_file, unit, 0.01, 8, unit) for unit in get_args(Unit)}
    assert [line.split()[4:] for line in keys_file.read_text().splitlines()] == [[], ["question"], ["window"]]
    assert {name: key.unit for name, key in parse_keys(keys_file).items()} == {unit: unit for unit in keys}
    short = {"questions": [ASKED] * 3}
    long = {**ASKED, "context": "word " * 150}
    with serving(make_app(api_keys_file=str(keys_file))) as url:

        def ask(unit: str, path: str, body: dict[str, Any], times: int) -> list[int]:
            with connect(url, keys[unit]) as client:
                replies = [client.post(path, json=body) for _ in range(times)]
            assert all(f"0.01 {unit}s a second" in reply.text for reply in replies if reply.status_code == 429)
            return [reply.status_code for reply in replies]

        assert ask("request", "/v1/answers", short, 9) == [200] * 8 + [429]
        assert ask("question", "/v1/answers", short, 4) == [200] * 3 + [429], "9 of 8, the last one a debt"
        with connect(url) as open_to_all:
            windows = open_to_all.post("/v1/answer", json=long, headers={"x-api-key": keys["window"]}).json()["windows"]
        assert windows > 8, "which leaves a debt"
        assert ask("window", "/v1/answer", long, 1) == [429]


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
        ("a " + "00" * 32 + " - -\na " + "11" * 32 + " - -", "line 2: name or key stands there twice"),
        ("a " + "00" * 32 + " - -\nb " + "00" * 32 + " - -", "line 2: name or key stands there twice"),
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
    assert keys_command("list", file=keys_file).stdout == "team-a  5 requests a second, 10 at once\nb  no limit\n"
    assert parse_keys(keys_file).keys() == {"team-a", "b"}
    for arguments, code, said in (
        (("new", "b"), 1, "has a key b already"),
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


def test_metrics_and_documentation_open_by_key_or_not_at_all(make_app: MakeApp, keys_file: Path, key: str) -> None:
    paths = ("/metrics", "/openapi.json", "/docs", "/static/swagger/swagger-ui.css")
    file = str(keys_file)
    for settings, without, with_key in (
        ({}, [200, 200, 200, 200], [200, 200, 200, 200]),
        ({"metrics": "off", "docs": "off"}, [404] * 4, [404] * 4),
        ({"api_keys_file": file, "metrics": "key", "docs": "key"}, [401, 401, 200, 200], [200] * 4),
        ({"api_keys_file": file, "metrics": "off", "docs": "off"}, [401, 401, 404, 404], [404] * 4),
    ):
        with serving(make_app(**settings)) as url, connect(url) as stranger, connect(url, key) as client:
            assert [stranger.get(path).status_code for path in paths] == without
            assert [client.get(path).status_code for path in paths] == with_key


@pytest.mark.parametrize(
    "settings",
    [{"metrics": "closed"}, {"docs": "key"}, {"cors_origins": "*"}, {"cors_origins": "https://a.example/"}],
)
def test_settings_that_cannot_be_are_named(settings: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=f"BERTQA_{next(iter(settings)).upper()}: "):
        Settings(**settings)  # type: ignore[arg-type]


ORIGIN = {"origin": "https://a.example"}
PREFLIGHT = {
    **ORIGIN,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type",
}


def test_other_origins_may_not_ask_unless_they_are_named(make_app: MakeApp, keys_file: Path, key: str) -> None:
    with serving(make_app()) as url, connect(url) as client:
        for response in (
            client.options("/v1/answer", headers=PREFLIGHT),
            client.post("/v1/answer", json=ASKED, headers=ORIGIN),
        ):
            assert not [name for name in response.headers if name.startswith("access-control")]
    origins = "https://a.example, http://localhost:3000"
    with (
        serving(make_app(cors_origins=origins, api_keys_file=str(keys_file))) as url,
        connect(url, key) as client,
        connect(url) as stranger,
    ):
        allowed = stranger.options("/v1/answer", headers=PREFLIGHT)  # browsers send no key with it
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://a.example"
        assert "authorization" in allowed.headers["access-control-allow-headers"]
        refused = stranger.options("/v1/answer", headers={**PREFLIGHT, "origin": "https://a.example.evil"})
        assert "Disallowed CORS origin" in problem(refused, 400, "cross_origin")
        assert "access-control-allow-origin" not in refused.headers
        answered = client.post("/v1/answer", json=ASKED, headers=ORIGIN)
        assert answered.headers["access-control-allow-origin"] == "https://a.example"
        assert "x-request-id" in answered.headers["access-control-expose-headers"]
        assert "access-control-allow-credentials" not in answered.headers
        unknown = stranger.post("/v1/answer", json=ASKED, headers=ORIGIN)
        problem(unknown, 401, "unauthorized")
        assert unknown.headers["access-control-allow-origin"] == "https://a.example"  # so that a page can read it


def test_every_response_is_hardened(shared_client: httpx.Client) -> None:
    for path in ("/", "/docs", "/static/page.js", "/v1/answer", "/no/such/path", "/health/live"):
        headers = shared_client.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-opener-policy"] == headers["cross-origin-resource-policy"] == "same-origin"
        assert "camera=()" in headers["permissions-policy"]
        assert "server" not in headers or headers["server"] == "uvicorn"  # `bertqa serve` tells none
