"""A toy model for the service: a real tokenizer with a few hundred pieces, and an engine that answers «marked» text."""

import asyncio
import threading
import time
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from bertqa.manifest import MODEL_NAME, Bundle, Manifest
from bertqa.spans import Logits
from bertqa.windows import Window, WindowTokenizer
from service.triton.admin import Loaded
from service.triton.errors import EngineError, EngineTimeout

_PIECES = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "«", "»"),
    *(chr(code) for code in range(0x21, 0x7F)),
    *(f"##{chr(code)}" for code in range(0x21, 0x7F)),
    *("horovod", "uber", "who", "made", "where", "was", "the", "##ing"),
    *("é", "##é", "서", "##울", "漢", "字", "م", "##ر", "😀", "e\u0301"),
]


def toy_bundle(tokenizer: Tokenizer | None = None) -> Bundle:
    """Make a bundle with short windows, and the toy tokenizer or another."""
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
    window_tokenizer = WindowTokenizer(
        tokenizer,
        max_seq_len=manifest.max_seq_len,
        max_question_tokens=manifest.max_question_tokens,
        overlap=manifest.overlap,
        buckets=manifest.buckets,
    )
    return Bundle(MODEL_NAME, 7, manifest, window_tokenizer)


class FakeEngine:
    """Answers with the first span between « and » in a window; a window without one has no answer."""

    def __init__(self, identity: str) -> None:
        self.identity = identity
        self.failure: Exception | None = None
        self.delay_s = 0.0
        self.concurrency = 64  # number of calls to run at once
        self.windows = 0  # answered
        self.looked_at = 0  # number of times that it reported the loaded models
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
        if deadline <= time.monotonic():
            raise EngineTimeout("The deadline passed before the engine answered.")
        self.windows += len(windows)
        return [self.logits(window) for window in windows]

    @staticmethod
    def logits(window: Window) -> Logits:
        """Return logits: null is 0, the marked span 16, others below null, earlier and shorter spans higher."""
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
        if isinstance(self.failure, EngineError):
            raise self.failure

    async def loaded(self, *, deadline: float) -> Loaded:
        if isinstance(self.failure, EngineError):
            raise self.failure
        self.looked_at += 1
        return Loaded({"identity_7": self.identity}, self.concurrency)

    async def server_version(self, *, deadline: float) -> str:
        if isinstance(self.failure, EngineError):
            raise self.failure
        return "2.51.0"

    def engine(self, model: str, version: int) -> "FakeEngine":
        return self

    def admin(self, model: str, version: int) -> "FakeEngine":
        return self

    async def close(self) -> None:
        self.closed = True
