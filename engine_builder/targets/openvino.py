"""Convert an ONNX graph to an OpenVINO model at a given precision; int8 is calibrated on real windows."""

import contextlib
import io
import logging
import os
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Literal, cast, get_args

import openvino as ov

from bertqa.hardware import INT8, cpu_features
from bertqa.manifest import sha256_of
from bertqa.spans import Logits
from bertqa.squad import Predict
from bertqa.windows import INPUT_NAMES, Window
from engine_builder.engine import Engine, EngineOptions, Source, wall_clock
from engine_builder.targets import openvino_model

Precision = Literal["fp32", "bf16", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
ENGINE_FILE = "engine.xml"


class OpenVINO:
    """OpenVINO on this machine's CPU, under Triton's Python backend; see `engine_builder.targets.Target`."""

    precisions: Sequence[str] = PRECISIONS
    calibrated = frozenset({"int8"})
    uncalibrated = "fp32"
    own_options = frozenset[str]()

    def default_precision(self) -> str:
        """Return the fastest precision on this CPU that keeps F1; docs/benchmarks.md has the comparison.

        With AMX, bf16 is as fast as int8, closer to float32, and needs no calibration. With AVX-512 alone, bf16 is
        slower than fp32. Int8 is fastest on CPUs that accumulate its products in 32 bits.
        """
        if multiplies_bf16_fast():
            return "bf16"
        return "int8" if adds_int8_fast() else "fp32"

    def diagnose(self) -> Mapping[str, str]:
        """Return nothing: every machine has a CPU."""
        return {}

    def check_machine(self, precision: str, options: EngineOptions) -> str:
        """Fall back to fp32 if this CPU would only emulate bf16, and log which precision is faster."""
        wanted = cast(Precision, precision)
        supported = supported_precision(wanted)
        if supported != wanted:
            faster = " (--precision int8 is faster)" if adds_int8_fast() else ""
            print(f"this CPU has no {wanted}; building {supported} instead{faster}", file=sys.stderr)
        elif wanted == "int8" and not adds_int8_fast():
            print("this CPU has no int8 instructions; --precision fp32 is faster", file=sys.stderr)
        elif wanted == "bf16" and not multiplies_bf16_fast():
            print(
                f"this CPU multiplies bf16 without AMX; --precision {self.default_precision()} is faster",
                file=sys.stderr,
            )
        return supported

    def build(
        self,
        source: Source,
        directory: Path,
        precision: str,
        options: EngineOptions,
        stack: ExitStack,  # not used: the engine needs no cleanup
    ) -> Engine:
        """Build the engine, and copy the code that Triton's Python backend runs into the same directory."""
        path, kind = directory / ENGINE_FILE, cast(Precision, precision)
        convert(source.reference, path, kind, source.calibration)
        predict = load(path, kind, source.buckets, options.threads or 0)
        shutil.copy(openvino_model.__file__, directory / "model.py")
        return Engine(
            file=ENGINE_FILE,
            sha256=openvino_model.engine_sha256(path),
            onnx_sha256=sha256_of(source.reference),
            runtime={"python": platform.python_version()}
            | {name: version_of(name) for name in ("openvino", "onnxruntime", "onnx", "nncf")},
            predict=predict,
            latency=partial(wall_clock, predict),
            max_batch_size=options.max_batch_size,
            cpu_features=cpu_features(),
        )


def load(path: Path, precision: Precision, buckets: Sequence[int], threads: int) -> Predict:
    """The engine as Triton will run it."""
    engine = openvino_model.Engine(
        path, precision=precision, buckets=buckets, threads=threads or len(os.sched_getaffinity(0))
    )

    def predict(window: Window) -> Logits:
        start, end = engine.infer(window.tensors())
        return start, end

    return predict


def supported_precision(wanted: Precision) -> Precision:
    """Return the requested precision, or fp32 if this CPU would only emulate bf16. Int8 runs everywhere."""
    if wanted == "bf16" and "BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return "fp32"
    return wanted


def multiplies_bf16_fast() -> bool:
    """Check whether this CPU has AMX for bf16; AVX-512's bf16 instructions are no faster than those for float32."""
    return "amx_bf16" in cpu_features()


def adds_int8_fast() -> bool:
    """Check whether this CPU accumulates int8 products in 32 bits; older x86 CPUs saturate at 16 and prefer floats."""
    return any(name in INT8 for name in cpu_features())


def convert(onnx_file: Path, destination: Path, precision: Precision, calibration: Sequence[Window]) -> None:
    """Convert a graph and write it as ``destination`` (``.xml``) with its ``.bin``.

    Args:
        onnx_file: float32 graph of `engine_builder.architectures`.
        destination: the ``.xml`` file to write.
        precision: weights are stored as float32, float16 (for bf16), or int8 with float32 embeddings, so that all
            buckets and processes can share the memory-mapped file.
        calibration: real windows; needed for int8 only.
    """
    model = ov.Core().read_model(onnx_file)
    model.reshape({name: [1, -1] for name in INPUT_NAMES})
    if precision == "int8":
        model = _quantize(model, calibration)
    # float16 represents float16 checkpoints exactly, and has more mantissa bits than bf16
    ov.save_model(model, destination, compress_to_fp16=precision == "bf16")


def _quantize(model: ov.Model, calibration: Sequence[Window]) -> ov.Model:
    import nncf  # noqa: PLC0415  slow to import, and needed for int8 only

    logging.getLogger("nncf").setLevel(logging.ERROR)  # nncf's set_log_level would also change other handlers
    with contextlib.redirect_stdout(io.StringIO()):  # nncf prints a progress bar per internal pass
        return nncf.quantize(
            model,
            nncf.Dataset([window.tensors() for window in calibration]),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=max(1, len(calibration)),
            ignored_scope=nncf.IgnoredScope(
                patterns=[
                    # attention: in floating point its products fuse into one operator, which is as fast as int8
                    r".*\.attention\.self\.(products|context)",
                    # a quantized embedding table would be unpacked once per bucket, at 47 MB each
                    r"embeddings\.words",
                ]
            ),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                # 7-bit weights on CPUs whose products would saturate
                overflow_fix=nncf.OverflowFix.DISABLE if adds_int8_fast() else nncf.OverflowFix.ENABLE
            ),
        )
