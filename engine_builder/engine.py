"""What the builder of a target is given and what it leaves: all that `build` knows of OpenVINO and TensorRT."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from bertqa.squad import Example, Predict
from bertqa.windows import Window, WindowMaker
from engine_builder.architectures import Architecture
from engine_builder.checkpoint import FloatArray

_MIN_CALLS, _MAX_CALLS = 10, 200
_SECONDS = 2.0  # of measuring at one length, unless the calls are slower than the fewest allow
_WARM_UP_CALLS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What an engine is built from."""

    architecture: Architecture
    weights: Mapping[str, FloatArray]
    reference: Path  # the float32 graph, in ONNX
    buckets: Sequence[int]  # lengths that it will be asked for, in tokens
    calibration: Sequence[Window]  # real windows; none where the precision needs none


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What the target that builds an engine may be told; the fields are flags of the command line."""

    threads: int | None = None  # cores that an engine may use on a CPU; None and 0 are all
    gpus: tuple[int, ...] | None = None  # devices that Triton shall use
    max_batch_size: int = 1  # windows in one call
    optimization_level: int | None = None  # None: TensorRT's own default
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False


def wall_clock(predict: Predict, windows: Sequence[Window]) -> dict[str, float]:
    """Percentiles of the time of one call, in milliseconds: "p50", "p90" and "p99".

    Args:
        predict: the engine.
        windows: taken in turns; at least one.
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
    """The 50th, 90th and 99th, rounded to microseconds, by the names ``p50`` and so on."""
    return {f"{prefix}p{n}": round(float(np.percentile(milliseconds, n)), 3) for n in (50, 90, 99)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """A built engine, ready to be asked as Triton will ask it."""

    file: str  # in the directory of the bundle
    sha256: str  # of all its files
    onnx_sha256: str  # of the graph that it was built from
    runtime: Mapping[str, str]  # library, driver or device -> version
    predict: Predict
    latency: Callable[[Sequence[Window]], Mapping[str, float]]  # windows of one length -> percentiles, in ms
    max_batch_size: int = 1
    cpu_features: tuple[str, ...] = ()


def full_windows(examples: Sequence[Example], maker: WindowMaker, length: int, count: int = 8) -> list[Window]:
    """Real windows without padding, spread over the data; contexts are joined, and repeated, where one is too short.

    Args:
        examples: what they are made of.
        maker: with the model's tokenizer.
        length: of each window, in tokens.
        count: at most that many; fewer where there are fewer examples.
    """
    step = max(1, len(examples) // count)
    windows: list[Window] = []
    for first in range(0, len(examples), step):
        text = "\n".join(dict.fromkeys(example.context for example in islice(examples, first, first + 64)))
        made = maker(
            examples[first].question,
            "\n".join([text] * (1 + length // max(1, len(text.split())))),
            max_seq_len=length,
            max_question_tokens=min(maker.max_question_tokens, length // 2),
            overlap=0,
        ).windows
        windows += [window for window in made[:1] if window.length == length]
    return windows[:count]
