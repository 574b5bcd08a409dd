"""Test the command line against a service with the toy engine; test_end_to_end.py tests the whole product."""

import fcntl
import json
import os
import pty
import re
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import pytest
import typer

from bertqa.cli import COMMANDS
from bertqa.cli.command import Exit, command, group, parse, status
from bertqa.manifest import MANIFEST_FILE, MODEL_NAME, TOKENIZER_FILE, Bundle, sha256_of
from bertqa.repository import Repository
from bertqa.squad import Example, Reference, as_squad
from service.commands.batch.worker import IN_FLIGHT
from service.triton.errors import EngineOverloaded
from tests.support.paths import ROOT
from tests.support.toy_model import FakeEngine

TEXT = "It was made by «Uber»."


def run(
    command: Sequence[str], *, stdin: bytes = b"", env: Mapping[str, str] | None = None, cwd: Path = ROOT
) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, **(env or {})}
    return subprocess.run(
        [*command], input=stdin, capture_output=True, cwd=cwd, timeout=120, check=False, env=environment
    )


def bertqa(*words: str, stdin: bytes = b"", **env: str) -> subprocess.CompletedProcess[bytes]:
    return run([sys.executable, "-m", "bertqa.cli", *words], stdin=stdin, env=env)


@pytest.fixture
def squad(tmp_path: Path) -> Path:
    path = tmp_path / "small.json"
    examples = [Example(f"{n}", "t", "who?", TEXT, (Reference("Uber", 16),)) for n in range(8)]
    path.write_text(json.dumps(as_squad(examples)))
    return path


# --- asking


def test_a_proxy_for_the_web_is_not_asked_for_this_machine(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    done = bertqa("ask", "Who made it?", "--context", "-", "--url", url, stdin=TEXT.encode())
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().split() == ["1.000", "16-20", "Uber"]
    assert done.stderr == b""


def test_offsets_count_the_file_as_it_is(url: str, tmp_path: Path) -> None:
    raw = "Horovod\r\n\r\n«Uber»\r\n".encode()
    (tmp_path / "text.txt").write_bytes(raw)
    for source in ("-", str(tmp_path / "text.txt")):
        done = bertqa("ask", "who?", "--context", source, "--url", url, "--format", "json", stdin=raw)
        (answer,) = json.loads(done.stdout)["answers"]
        assert raw.decode()[answer["start"] : answer["end"]] == answer["text"] == "Uber"


def test_no_answer_is_said_on_standard_error_with_a_code_of_its_own(url: str) -> None:
    words = ("ask", "Who made it?", "--context", "-")
    done = bertqa(*words, stdin=b"Nothing is marked.", BERTQA_URL=url)
    assert (done.returncode, done.stdout) == (Exit.NO, b"")
    assert done.stderr == b"bertqa: no answer: the text does not seem to answer this\n"
    guess = bertqa(*words, "--guess", stdin=b"Nothing is marked.", BERTQA_URL=url)
    assert guess.returncode == 0
    assert re.fullmatch(rb"0\.\d{3}  \d+-\d+  .+\n", guess.stdout)
    machine = bertqa(*words, "--format=json", stdin=b"Nothing is marked.", BERTQA_URL=url)
    assert machine.returncode == Exit.NO
    assert json.loads(machine.stdout)["has_answer"] is False


def test_what_is_not_utf_8_or_out_of_range_is_said_plainly(url: str, squad: Path) -> None:
    binary = bertqa("ask", "who?", "--context", "-", "--url", url, stdin=b"\xff")
    assert (binary.returncode, binary.stderr.count(b"\n")) == (2, 1)
    assert b"--context -: 'utf-8' codec can't decode" in binary.stderr
    for flag in ("--concurrency", "--limit"):
        refused = bertqa("evaluate", "--data", str(squad), "--url", url, flag, "0")
        assert refused.returncode == Exit.USAGE
        assert f"'{flag}': must be at least 1, not 0".encode() in refused.stderr


def test_exit_codes_tell_network_server_and_request_apart(url: str, engine: FakeEngine) -> None:
    words = ("ask", "who?", "--context", "-", "--timeout", "1")
    gone = bertqa(*words, "--url", "http://127.0.0.1:9", stdin=b"text")
    assert gone.returncode == Exit.UNREACHABLE
    assert b"is `bertqa serve` running?" in gone.stderr
    refused = bertqa(*words, "--url", url, "--top-k", "1000", stdin=b"text")
    assert refused.returncode == Exit.USAGE
    assert b"top_k" in refused.stderr
    assert b"(status 422)" in refused.stderr
    engine.failure = EngineOverloaded("too many questions")
    busy = bertqa(*words, "--url", url, stdin=b"text")
    assert busy.returncode == Exit.SERVER
    assert b"(status 503)" in busy.stderr
    nowhere = bertqa(*words, "--url", "localhost:8000", stdin=b"text")
    assert nowhere.returncode == Exit.USAGE
    for done in (gone, refused, busy, nowhere):
        assert done.stdout == b""
        assert b"Traceback" not in done.stderr


# --- evaluating


def test_a_score_comes_from_a_busy_service_with_an_account_of_the_waits(
    url: str, engine: FakeEngine, squad: Path
) -> None:
    def recover() -> None:
        assert engine.started.wait(60)
        time.sleep(0.5)
        engine.failure = None

    engine.failure = EngineOverloaded("too many questions")
    thread = threading.Thread(target=recover)
    thread.start()
    done = bertqa("evaluate", "--data", str(squad), "--url", url, "--format", "json")
    thread.join()
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["questions"], found["exact_match"], found["f1"]) == (8, 100.0, 100.0)
    assert found["retries"] >= 1
    assert found["seconds_waited"] >= found["retries"], "each as long as retry-after says"
    said = done.stderr.decode().splitlines()
    assert len(said) == 1, "no progress bar, and the wait is said once"
    assert re.search(r"status 503\)\. Trying again for up to 60 s\.", said[0])


def test_a_score_below_the_demanded_one_has_a_code_of_its_own(url: str, squad: Path) -> None:
    done = bertqa("evaluate", "--data", str(squad), "--url", url, "--min-f1", "100.1")
    assert done.returncode == Exit.BELOW
    assert re.search(rb"^f1 +100\.0$", done.stdout, re.MULTILINE)
    assert done.stderr == b"bertqa: error: F1 100.00 is below --min-f1 100.1\n"


def test_a_terminal_sees_progress(url: str, squad: Path) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "-m", "bertqa.cli", "evaluate", "--data", str(squad), "--url", url]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs, cwd=ROOT)
    os.close(theirs)
    said = b""
    try:
        while chunk := os.read(ours, 1024):
            said += chunk
    except OSError:  # the end of a terminal
        pass
    assert process.wait(60) == 0
    assert b"8/8" in said


# --- the command itself


def test_the_console_script_is_this_command() -> None:
    done = run([str(Path(sys.executable).with_name("bertqa")), "--version"])
    assert re.fullmatch(rb"bertqa \d+\.\d+\.\d+\n", done.stdout), done.stderr


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["aks"], "Did you mean 'ask'?"),
        (["keys", "revok"], "Did you mean 'revoke'?"),
        (["ask", "--contxt"], "--context"),
    ],
)
def test_a_slip_gets_a_hint(words: list[str], hint: str) -> None:
    done = bertqa(*words)
    assert done.returncode == Exit.USAGE
    assert hint in done.stderr.decode()


def test_the_shell_completes_commands() -> None:
    done = bertqa(_BERTQA_COMPLETE="complete_bash", COMP_WORDS="bertqa d", COMP_CWORD="1")
    assert done.stdout.decode().split() == ["doctor"], done.stderr


PACKAGES = [
    *(
        "torch",
        "transformers",
        "safetensors",
        "openvino",
        "onnx",
        "onnxruntime",
        "nncf",
        "matplotlib",
        "ray",
        "pyarrow",
    ),
    *("locust", "gevent", "httpx", "tqdm", "fastapi", "starlette", "uvicorn", "pydantic_settings", "grpc", "google"),
    *("tritonclient", "psutil", "sentencex", "mwparserfromhell"),
]
"""Everything that commands import, but numpy, tokenizers, and Typer with what it needs itself."""

HELP = [
    *([name] for name in COMMANDS),
    *(["train", name] for name in ("squad", "glue", "pretrain", "average", "data")),
    *(["train", name] for name in ("teach", "hard-negatives", "import-mpnet")),
    *(["train", "teach", name] for name in ("squad", "glue")),
    *(["train", "data", name] for name in ("wikipedia", "books", "text", "articles", "tokenizer", "shard")),
    *(["models", name] for name in ("list", "load", "check", "switch", "rollback", "unload")),
    *(["keys", name] for name in ("new", "list", "revoke")),
]


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which only numpy, tokenizers and Typer can be imported."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "sitecustomize.py").write_text(
        f"""
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {PACKAGES!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Refuse())
"""
    )
    return {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


def test_help_needs_no_package_but_typer(bare: dict[str, str]) -> None:
    program = "import sys, contextlib, io; from bertqa.cli import app; from bertqa.cli.command import status\n"
    program += "for line in sys.stdin: print(status(app, [*line.split(), '--help']), line, flush=True)"
    lines = "\n".join(" ".join(words) for words in [[], *HELP])
    done = run([sys.executable, "-c", program], stdin=lines.encode(), env=bare)
    assert done.stderr == b""
    text = done.stdout.decode()
    assert len(re.findall(r"^0 ", text, re.MULTILINE)) == len(HELP) + 1
    assert "Not installed" not in text
    usage = re.compile(r"^Usage: .*$", re.MULTILINE)  # has arguments in braces
    assert "{" not in usage.sub("", text), "no template is left unfilled"
    assert f"or {IN_FLIGHT})" in " ".join(text.split()), "lines wrap"


@pytest.mark.parametrize(
    "module",
    [
        *("service", "engine_builder", "training.data", "loadtest.sweep"),
        *(f"training.{name}" for name in ("finetune_squad", "finetune_glue", "pretrain", "average")),
        *(f"training.{name}" for name in ("teach", "hard_negatives", "import_mpnet")),
        *(f"engine_builder.benchmarks.{name}" for name in ("compare_runtimes", "compare_buckets", "hardware_floor")),
        *(f"loadtest.{name}" for name in ("measure_service", "measure_admission", "compare_servers")),
        *("training.measure_training", "loadtest.sleeping_engine"),
    ],
)
def test_modules_give_help_without_their_packages(bare: dict[str, str], module: str) -> None:
    done = run([sys.executable, "-m", module, "--help"], env=bare)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"Usage: ")


@pytest.mark.parametrize(
    ("words", "package", "extra"),
    [
        (["ask", "who?", "--context", __file__], "httpx", "cli"),
        (["doctor"], "pydantic_settings|google|grpc", "service"),
        (["batch", "--input", "a", "--output", "b"], "pyarrow|pydantic|tqdm", "batch"),
        (["build", "--checkpoint", "a", "--target", "cpu"], "onnx|tqdm|openvino", "builder"),
        (["train", "squad", "--train", "a", "--output", "b"], "torch", "training"),
    ],
)
def test_a_missing_package_is_one_line_with_the_extra(
    bare: dict[str, str], words: list[str], package: str, extra: str
) -> None:
    done = run([sys.executable, "-m", "bertqa.cli", *words], env=bare)
    assert done.returncode == Exit.USAGE, done.stderr
    line = rf"bertqa: error: this command needs the package ({package})[.\w]*: pip install .* '\.\[{extra}\]' in a .*\n"
    assert re.fullmatch(line, done.stderr.decode()), done.stderr


def test_commands_of_a_package_that_is_not_there_say_how_to_get_it(tmp_path: Path) -> None:
    (tmp_path / "bertqa").symlink_to(ROOT / "bertqa")
    environment = {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}
    program = "import sys; sys.path[:] = [each for each in sys.path if each != '']; from bertqa import cli; cli.main()"
    block = "sys.modules.update(dict.fromkeys(['service', 'training', 'engine_builder', 'loadtest']))"
    command = [sys.executable, "-c", program.replace("import sys;", f"import sys; {block};", 1)]
    listed = run([*command, "--help"], env=environment, cwd=tmp_path)
    assert re.search(rb"serve +Not installed: pip install", listed.stdout), listed.stderr
    assert re.search(rb"ask +Ask one question about a text\.", listed.stdout)
    done = run([*command, "serve", "--port", "80"], env=environment, cwd=tmp_path)
    assert done.returncode == Exit.USAGE
    assert re.fullmatch(rb"bertqa: error: serve is not part of this installation: pip install .*\n", done.stderr)


# --- serving


@pytest.fixture
def repository_of_toy(bundle: Bundle, tmp_path: Path) -> Path:
    """A model repository with one version, whose engine no Triton could run."""
    repository = Repository(tmp_path / "model_repository")
    directory = repository.directory(MODEL_NAME, 1)
    directory.mkdir(parents=True)
    (directory / TOKENIZER_FILE).write_text(bundle.tokenizer.tokenizer_json())
    hashed = sha256_of(directory / TOKENIZER_FILE)
    manifest = replace(bundle.manifest, tokenizer_sha256=hashed, files={TOKENIZER_FILE: hashed})
    manifest.write(directory / MANIFEST_FILE)
    repository.activate(MODEL_NAME, 1)
    return repository.root


def test_a_port_that_is_taken_is_refused(repository_of_toy: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for flag in ("--port", "--triton-grpc-port"):
            free = [] if flag == "--port" else ["--port", "0"]
            done = bertqa("serve", flag, port, *free, "--repository", str(repository_of_toy))
            assert done.returncode
            assert re.search(rf"port {port} of 127\.0\.0\.1 is taken by .* with {flag},".encode(), done.stderr), (
                done.stderr
            )
            assert b"Traceback" not in done.stderr


def test_nothing_is_built_for_a_triton_of_somebody_else(tmp_path: Path) -> None:
    done = bertqa("serve", "--port", "0", "--repository", str(tmp_path / "typo"), "--triton-url", "127.0.0.1:9")
    assert done.returncode
    assert (
        f"--repository {tmp_path / 'typo'}: has no model, and with --triton-url none is built".encode() in done.stderr
    )
    assert not (tmp_path / "typo").exists()


def test_a_default_model_that_is_not_there_is_refused_before_anything_starts(tmp_path: Path) -> None:
    done = bertqa("serve", "--repository", str(tmp_path), BERTQA_MODEL="foo")
    assert done.returncode == Exit.USAGE
    assert done.stderr == b"bertqa: error: BERTQA_MODEL: must be one of bert_qa; got 'foo'\n"


# --- options written once


@dataclass(frozen=True, kw_only=True)
class Shared:
    url: Annotated[str, typer.Option(help="Where.")] = "here"


@dataclass(frozen=True, kw_only=True)
class Own(Shared):
    name: Annotated[str, typer.Argument(help="Who.")]
    count: Annotated[int, typer.Option(min=1, help="How many.")] = 3

    def __post_init__(self) -> None:
        if self.count == 13:
            raise ValueError("--count: not 13")


def test_options_are_inherited_and_checked_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(Own, ["me", "--url", "there"]) == Own(name="me", url="there")
    for argv, said in ((["me", "--count", "13"], "error: --count: not 13"), (["me", "--count", "0"], "'--count'")):
        with pytest.raises(SystemExit) as end:
            parse(Own, argv)
        assert end.value.code == Exit.USAGE
        assert said in capsys.readouterr().err
    app = group("")

    @command(app, Own, extra="cli")
    def do(options: Own) -> int:
        """Do it."""
        return options.count

    assert status(app, ["me", "--count", "7"]) == 7
    assert status(app, ["--help"]) == 0
    text = capsys.readouterr().out
    assert text.index("--count") < text.index("--url"), "a command's own options come first"


def test_ctrl_c_ends_a_wait(url: str, engine: FakeEngine) -> None:
    engine.failure = EngineOverloaded("too many questions")
    words = [sys.executable, "-m", "bertqa.cli", "ask", "who?", "--context", __file__, "--url", url]
    process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE)
    assert process.stderr
    assert b"Trying again" in process.stderr.readline()
    process.send_signal(2)
    end = threading.Timer(30, process.kill)
    end.start()
    assert process.wait() == 130
    end.cancel()
    process.stderr.close()
