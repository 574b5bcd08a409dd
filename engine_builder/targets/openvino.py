"""ONNX graph -> OpenVINO model at the wanted precision; int8 is calibrated on real windows."""

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
        """The fastest on this CPU among those that keep F1; docs/benchmarks.md has the comparison.

        With AMX bf16 is as fast as int8, closer to float32, and built without calibration. With AVX-512 alone it is
        slower than fp32, and int8 is fastest wherever its products are added up in 32 bits.
        """
        if multiplies_bf16_fast():
            return "bf16"
        return "int8" if adds_int8_fast() else "fp32"

    def diagnose(self) -> Mapping[str, str]:
        """Nothing is missing: every machine has a CPU."""
        return {}

    def check_machine(self, precision: str, options: EngineOptions) -> str:
        """Take fp32 where this CPU would only emulate bf16, and say which precision is faster."""
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
        stack: ExitStack,  # holds nothing that outlives the process
    ) -> Engine:
        """Build the engine, and copy the code that Triton's Python backend runs beside it."""
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
    """The wanted precision, or fp32 where this CPU would only emulate bf16. Int8 runs everywhere."""
    if wanted == "bf16" and "BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return "fp32"
    return wanted


def multiplies_bf16_fast() -> bool:
    """Whether this CPU has AMX for bf16; AVX-512's instructions do no more in a cycle than those for float32."""
    return "amx_bf16" in cpu_features()


def adds_int8_fast() -> bool:
    """Whether this CPU adds int8 products up in 32 bits; older x86 saturates at 16, and is faster with floats."""
    return any(name in INT8 for name in cpu_features())


def convert(onnx_file: Path, destination: Path, precision: Precision, calibration: Sequence[Window]) -> None:
    """Convert a graph and write it as ``destination`` (``.xml``) with its ``.bin``.

    Args:
        onnx_file: of `engine_builder.architectures`, float32.
        destination: the ``.xml`` file to write.
        precision: weights are stored as float32, float16 (for bf16) or int8 with float32 embeddings, which all
            buckets and processes then share as they lie in the file.
        calibration: real windows; needed for int8 only.
    """
    model = ov.Core().read_model(onnx_file)
    model.reshape({name: [1, -1] for name in INPUT_NAMES})
    if precision == "int8":
        model = _quantize(model, calibration)
    # float16 holds every weight of a checkpoint stored as such, and more bits than bf16 keeps
    ov.save_model(model, destination, compress_to_fp16=precision == "bf16")


def _quantize(model: ov.Model, calibration: Sequence[Window]) -> ov.Model:
    import nncf  # noqa: PLC0415  slow to import, and needed for int8 only

    logging.getLogger("nncf").setLevel(logging.ERROR)  # set_log_level would set handlers too, also those of others
    with contextlib.redirect_stdout(io.StringIO()):  # its own progress bars, one per internal pass
        return nncf.quantize(
            model,
            nncf.Dataset([window.tensors() for window in calibration]),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=max(1, len(calibration)),
            ignored_scope=nncf.IgnoredScope(
                patterns=[
                    # scores and context of attention: in floating point they fuse into one operator, which is as fast
                    r".*\.attention\.self\.(products|context)",
                    # quantized, the table would be unpacked once for every bucket, 47 MB each time
                    r"embeddings\.words",
                ]
            ),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                # weights of 7 bits where products would saturate
                overflow_fix=nncf.OverflowFix.DISABLE if adds_int8_fast() else nncf.OverflowFix.ENABLE
            ),
        )
