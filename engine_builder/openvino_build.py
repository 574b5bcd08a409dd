"""ONNX graph -> OpenVINO model at the wanted precision; int8 is calibrated on real windows."""

import contextlib
import io
import logging
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import openvino as ov

from bertqa.windows import INPUT_NAMES, Window

Precision = Literal["fp32", "bf16", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
DEFAULT_PRECISION: Precision = "bf16"
"""On a CPU with bf16 instructions as fast as int8, much closer to float32, and built without calibration;
docs/benchmarks.md has the comparison."""

CALIBRATION_WINDOWS = 64
"""Windows that int8 ranges are measured on; more take longer and move F1 by less than its noise."""


def supported_precision(wanted: Precision) -> Precision:
    """The wanted precision, or fp32 where this CPU would only emulate bf16. Int8 runs everywhere."""
    if wanted == "bf16" and "BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return "fp32"
    return wanted


def build_engine(onnx_file: Path, destination: Path, precision: Precision, calibration: Sequence[Window]) -> None:
    """Convert a graph and write it as ``destination`` (``.xml``) with its ``.bin``.

    Args:
        onnx_file: of `engine_builder.bert_onnx`, float32.
        destination: the ``.xml`` file to write.
        precision: weights are stored as float32, float16 (for bf16) or int8.
        calibration: real windows; needed for int8 only.
    """
    model = ov.Core().read_model(onnx_file)
    model.reshape({name: [1, -1] for name in INPUT_NAMES})
    if precision == "int8":
        model = _quantize(model, calibration)
    # float16 holds every weight of a checkpoint stored as such, and more bits than bf16 keeps
    ov.save_model(model, destination, compress_to_fp16=precision != "fp32")


def _quantize(model: ov.Model, calibration: Sequence[Window]) -> ov.Model:
    os.environ.setdefault("NNCF_CI", "1")  # keeps it from reporting usage to its makers
    import nncf  # noqa: PLC0415  slow to import, and needed for int8 only

    nncf.set_log_level(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):  # its own progress bars, one per internal pass
        return nncf.quantize(
            model,
            nncf.Dataset([window.tensors() for window in calibration]),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=max(1, len(calibration)),
            # scores and context of attention: in floating point they fuse into one operator, which is as fast
            ignored_scope=nncf.IgnoredScope(patterns=[r".*\.attention\.self\.(products|context)"]),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                overflow_fix=nncf.OverflowFix.DISABLE if _has_vnni() else nncf.OverflowFix.ENABLE
            ),
        )


def _has_vnni() -> bool:
    """Whether int8 products add up in 32 bits; older x86 saturates at 16, which NNCF avoids with 7-bit weights."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return any(flag in flags for flag in ("avx512_vnni", "avx_vnni", "amx_int8"))
