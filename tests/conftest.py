"""A toy model of the service: a real tokenizer of a few hundred pieces, and an engine that answers what is «marked»."""

import asyncio
import contextlib
import json
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from bertqa.manifest import MODEL_NAME, Bundle, Manifest
from bertqa.spans import Logits
from bertqa.windows import Window, WindowMaker
from engine_builder.checkpoint import BertConfig
from engine_builder.tensorrt_build import missing_parts
from service.app import create_app
from service.settings import Settings
from service.triton import ModelError

# How long an example takes says something of the machine, and nothing of the code.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

_NOT_RUN: list[str] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs a GPU where there is none; the summary lists it."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and missing_parts():
        items[:] = [item for item in items if item not in marked]
        config.hook.pytest_deselected(items=marked)
        _NOT_RUN.extend(item.nodeid for item in marked)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was not run, and why."""
    if _NOT_RUN:
        terminalreporter.section(
            f"NOT RUN: {len(_NOT_RUN)} tests, for this machine has not {', '.join(missing_parts())}"
        )
        for name in _NOT_RUN:
            terminalreporter.line(f"not run: {name}")


_PIECES = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "«", "»"),
    *(chr(code) for code in range(0x21, 0x7F)),
    *(f"##{chr(code)}" for code in range(0x21, 0x7F)),
    *("horovod", "uber", "who", "made", "where", "was", "the", "##ing"),
    *("é", "##é", "서", "##울", "漢", "字", "م", "##ر", "😀", "e\u0301"),
]


def toy_bundle(tokenizer: Tokenizer | None = None) -> Bundle:
    """A bundle with short windows, of the toy's own tokenizer or another."""
    if tokenizer is None:
        tokenizer = Tokenizer(WordPiece({piece: number for number, piece in enumerate(_PIECES)}, unk_token="[UNK]"))
        tokenizer.normalizer = BertNormalizer(lowercase=True, strip_accents=False)
        tokenizer.pre_tokenizer = BertPreTokenizer()
    manifest = Manifest(
        name="toy",
        target="cpu",
        precision="fp32",
        engine_file="model.xml",
        engine_sha256="0" * 64,
        tokenizer_sha256="1" * 64,
        checkpoint_sha256="2" * 64,
        onnx_sha256="3" * 64,
        vocabulary_size=tokenizer.get_vocab_size(),
        max_seq_len=64,
        overlap=16,
        max_question_tokens=16,
        null_threshold=0.0,
        exact_match=100.0,
        f1=100.0,
        reference_f1=100.0,
        gate_questions=1,
        gate_data="none",
        runtime={"numpy": np.__version__},
        built="2026-01-01T00:00:00Z",
        triton=("2.49.0", ""),
        buckets=(32, 64),
    )
    maker = WindowMaker(
        tokenizer,
        max_seq_len=manifest.max_seq_len,
        max_question_tokens=manifest.max_question_tokens,
        overlap=manifest.overlap,
        buckets=manifest.buckets,
    )
    return Bundle(MODEL_NAME, 7, manifest, maker)


@pytest.fixture(scope="session")
def bundle() -> Bundle:
    return toy_bundle()


class FakeEngine:
    """Holds that the first span between « and » in a window is its answer, and that a window without has none."""

    def __init__(self, identity: str) -> None:
        self.identity = identity
        self.failure: Exception | None = None
        self.delay_s = 0.0
        self.call_s = 0.0  # as it tells
        self.seconds_each = 0.0  # how much longer a request waits for each that is before it
        self.windows = 0  # answered
        self.cancelled = threading.Event()
        self.started = threading.Event()
        self.closed = False

    async def predict(self, windows: Sequence[Window], *, deadline: float) -> list[Logits]:
        self.started.set()
        try:
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        if self.failure is not None:
            raise self.failure
        assert deadline > time.monotonic()
        self.windows += len(windows)
        return [self.logits(window) for window in windows]

    @staticmethod
    def logits(window: Window) -> Logits:
        """Null is 0; the marked span is 16; any other span is below null, earlier and shorter ones being better."""
        slope = np.linspace(-4, -5, window.length, dtype=np.float32)[None]
        start, end = slope.copy(), slope.copy()
        start[0, 0] = end[0, 0] = 0
        ids = window.input_ids[0].tolist()
        opening, closing = _PIECES.index("«"), _PIECES.index("»")
        if opening in ids and closing in ids[ids.index(opening) + 2 :]:
            start[0, ids.index(opening) + 1] = 8
            end[0, ids.index(closing, ids.index(opening) + 2) - 1] = 8
        return start, end

    async def check_ready(self, *, deadline: float) -> None:
        if isinstance(self.failure, ModelError):
            raise self.failure

    async def model_parameters(self, *, deadline: float) -> Mapping[str, str]:
        if isinstance(self.failure, ModelError):
            raise self.failure
        return {"identity_7": self.identity}

    def expected_wait(self, ahead: int) -> float:
        return self.seconds_each * ahead

    async def server_version(self, *, deadline: float) -> str:
        if isinstance(self.failure, ModelError):
            raise self.failure
        return "2.51.0"

    def at(self, model: str, version: int) -> "FakeEngine":
        return self

    async def close(self) -> None:
        self.closed = True


@pytest.fixture
def engine(bundle: Bundle) -> FakeEngine:
    return FakeEngine(bundle.manifest.identity)


@pytest.fixture
def make_app(bundle: Bundle, engine: FakeEngine) -> Callable[..., FastAPI]:
    """Makes the real application with the toy bundle and engine; keyword arguments are `Settings`."""

    def make(**settings: object) -> FastAPI:
        return create_app(Settings(**settings), engine=engine, bundle=bundle)  # type: ignore[arg-type]

    return make


@contextlib.contextmanager
def serving(app: FastAPI, **options: Any) -> Iterator[str]:
    """Serve an application with uvicorn on a free port, in a thread of its own; gives the base URL."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", ws="none", **options))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


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


_TEXT = "Ada Lovelace wrote the first program in London. Who wrote it? Where was it written? Horovod was made at Uber."


def write_checkpoint(directory: Path, *, prefix: str = "bert.", text: str = _TEXT, **fields: object) -> Path:
    """A BERT for question answering of two small layers with random weights, and a tokenizer that knows the words of
    ``text``; ``fields`` replace those of config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    words = dict.fromkeys(
        ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(text.lower().replace(".", " .").replace("?", " ?").split())]
    )
    tokenizer = Tokenizer(WordPiece({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "architectures": ["BertForQuestionAnswering"],
        "model_type": "bert",
        "hidden_act": "gelu",
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
    } | fields
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "bertqa.json").write_text(
        json.dumps({"name": "tiny", "max_seq_len": 128, "overlap": 16, "max_question_tokens": 16})
    )
    random = np.random.default_rng(0)
    shapes = BertConfig.read(directory / "config.json").shapes()
    weights = {
        name if name.startswith("qa_outputs") else prefix + name: random.normal(
            "LayerNorm.weight" in name, 0.2, shape
        ).astype(np.float16)
        for name, shape in shapes.items()
    }
    save_file(weights, directory / "model.safetensors")
    return directory
