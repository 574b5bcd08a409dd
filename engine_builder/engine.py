"""The inputs and outputs of a target's builder; `build` knows nothing else about OpenVINO and TensorRT."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from bertqa.squad import Example, Predict
from bertqa.windows import Window, WindowTokenizer
from engine_builder.architectures import Architecture
from engine_builder.checkpoint import FloatArray

_MIN_CALLS, _MAX_CALLS = 10, 200
_SECONDS = 2.0  # time to measure one length; slow engines take longer, for the minimum number of calls
_WARM_UP_CALLS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What an engine is built from."""

    architecture: Architecture
    weights: Mapping[str, FloatArray]
    reference: Path  # the float32 graph, in ONNX
    buckets: Sequence[int]  # window lengths that the engine must support, in tokens
    calibration: Sequence[Window]  # real windows; empty if the precision needs no calibration


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Options of a target's builder; the fields are command-line flags."""

    threads: int | None = None  # CPU cores that an engine may use; None and 0 mean all
    gpus: tuple[int, ...] | None = None  # GPUs that Triton uses
    max_batch_size: int = 1  # windows in one call
    optimization_level: int | None = None  # None: TensorRT's own default
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False


def wall_clock(predict: Predict, windows: Sequence[Window]) -> dict[str, float]:
    """Measure percentiles of the time of one call, in milliseconds: "p50", "p90" and "p99".

    Args:
        predict: the engine.
        windows: inputs of the calls, in turn; at least one.
    """
    for n in range(_WARM_UP_CALLS):
        predict(windows[n % len(windows)])
    seconds: list[float] = []
    end = time.perf_counter() + _SECONDS
    while len(seconds) < _MIN_CALLS or (len(seconds) < _MAX_CALLS and time.perf_counter() < end):
        window = windows[len(seconds) % len(windows)]
        started = time.perf_counter()
        predict(window)
        seconds.append(time.perf_counter() - started)
    return percentiles([1e3 * each for each in seconds])


def percentiles(milliseconds: Sequence[float], prefix: str = "") -> dict[str, float]:
    """Return the 50th, 90th and 99th percentile, rounded to microseconds, as ``p50`` and so on."""
    return {f"{prefix}p{n}": round(float(np.percentile(milliseconds, n)), 3) for n in (50, 90, 99)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """A built engine, loaded as Triton will load it."""

    file: str  # name in the bundle's directory
    sha256: str  # of all engine files
    onnx_sha256: str  # of the graph that the engine was built from
    runtime: Mapping[str, str]  # library, driver or device -> version
    predict: Predict
    latency: Callable[[Sequence[Window]], Mapping[str, float]]  # windows of one length -> percentiles, in ms
    max_batch_size: int = 1
    cpu_features: tuple[str, ...] = ()


def full_windows(examples: Sequence[Example], tokenizer: WindowTokenizer, length: int, count: int = 8) -> list[Window]:
    """Make windows of real text without padding, spread over the data; short contexts are joined and repeated.

    Args:
        examples: source of questions and contexts.
        tokenizer: window tokenizer with the model's tokenizer.
        length: length of each window, in tokens.
        count: number of windows at most; there may be fewer examples.
    """
    step = max(1, len(examples) // count)
    windows: list[Window] = []
    for first in range(0, len(examples), step):
        text = "\n".join(dict.fromkeys(example.context for example in islice(examples, first, first + 64)))
        made = tokenizer(
            examples[first].question,
            "\n".join([text] * (1 + length // max(1, len(text.split())))),
            max_seq_len=length,
            max_question_tokens=min(tokenizer.max_question_tokens, length // 2),
            overlap=0,
        ).windows
        windows += [window for window in made[:1] if window.length == length]
    return windows[:count]
