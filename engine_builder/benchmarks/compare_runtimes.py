r"""Compare the speed of runtimes for a checkpoint, and what each costs in F1: a Markdown table and a bar chart.

    python -m engine_builder.benchmarks.compare_runtimes --checkpoint checkpoints/minilm-l6-squad --data dev-v1.1.json \
        --lengths 128 --lengths 384 --chart chart.png

The framework that trained the checkpoint and every engine that runs on this machine see the same real windows, one at
a time, in turns within one run, so that a busy minute slows all alike. A call is timed from array to array; TensorRT's
alone is the GPU's own time for a CUDA graph, which is how Triton runs it. What is missing here has its line too.
"""

if __name__ == "__main__":  # before the imports, because --help needs none of them
    from bertqa.cli.command import run
    from engine_builder.benchmarks.commands import runtimes_app

    run(runtimes_app, "python -m engine_builder.benchmarks.compare_runtimes")


import logging
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from tqdm import tqdm

from bertqa.hardware import cpu_name
from bertqa.manifest import Settings
from bertqa.spans import Logits
from bertqa.squad import Example, Predict, answer_all, read_squad, score
from bertqa.windows import OUTPUT_NAMES, Window, WindowTokenizer
from engine_builder.architectures import build_graph, read_architecture
from engine_builder.architectures.encoder import Encoder
from engine_builder.benchmarks.commands import RuntimesOptions
from engine_builder.build import calibration_windows, window_tokenizer
from engine_builder.checkpoint import CALIBRATION_FILE, InvalidCheckpoint, find_checkpoint, read_weights
from engine_builder.engine import EngineOptions, Source, full_windows
from engine_builder.gate import load_onnx
from engine_builder.publish import BuildRefused
from engine_builder.targets import TARGETS, openvino
from engine_builder.targets.openvino import Precision

BASELINE = "ONNX Runtime fp32"
CALLS = 5  # measured calls in a row, after one that is not
PAUSE_S = 0.02  # until the idle threads of the runtime before have stopped spinning
_FRAMEWORK_ON_GPU = "PyTorch fp16, GPU"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    milliseconds: Mapping[int, float]  # median of a call, by length; empty if it was not measured
    f1: float  # NaN if it was not measured
    missing: str = ""  # why it was not


@dataclass(frozen=True, slots=True)
class Runtime:
    """A runtime that is built and ready."""

    predict: Predict
    latency: Callable[[Sequence[Window]], Mapping[str, float]] | None = None  # its own measure, where it has one


class Unavailable(Exception):
    """A runtime cannot run on this machine; the message says what is missing."""


def main(args: RuntimesOptions) -> None:
    """Build every variant, time them side by side, score them, print the table."""
    checkpoint = find_checkpoint(args.checkpoint)
    architecture = read_architecture(checkpoint)
    tokenizer = window_tokenizer(checkpoint, Settings.of_checkpoint(checkpoint), architecture)
    lengths = args.lengths or list(tokenizer.buckets)
    if unknown := [length for length in lengths if length not in tokenizer.buckets]:
        raise InvalidCheckpoint(
            f"--lengths {unknown[0]}: the model's buckets are {', '.join(map(str, tokenizer.buckets))}"
        )
    examples = read_squad(args.data)
    calibration_file = args.calibration_data or checkpoint / CALIBRATION_FILE
    calibration = []
    if args.calibration_data or calibration_file.is_file():
        calibration = calibration_windows(read_squad(calibration_file), tokenizer)
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        plain = Path(directory) / "plain.onnx"
        weights = read_weights(checkpoint, architecture)
        onnx.save(build_graph(architecture, weights), plain)
        source = Source(
            architecture=architecture,
            weights=weights,
            reference=plain,
            buckets=tokenizer.buckets,
            calibration=calibration,
        )
        rows: dict[str, Row] = {}
        runtimes: dict[str, Runtime] = {}
        for name, build in tqdm(_variants(source, checkpoint, args.threads, stack).items(), "building"):
            rows[name] = Row({}, float("nan"))  # in the table's order
            try:
                runtimes[name] = build()
            except (Unavailable, BuildRefused) as error:
                rows[name] = Row({}, float("nan"), str(error).splitlines()[0])
        windows = {length: full_windows(examples, tokenizer, length) for length in lengths}
        medians = _time(runtimes, windows, args.rounds)
        for name, runtime in runtimes.items():
            rows[name] = Row(medians[name], _f1(examples, args.questions, tokenizer, runtime.predict, name))
    _print_table(rows, lengths)
    if args.chart:
        draw(rows, args.chart, f"{Settings.of_checkpoint(checkpoint).name}, one window at a time")


def _variants(source: Source, checkpoint: Path, threads: int, stack: ExitStack) -> Mapping[str, Callable[[], Runtime]]:
    """The function that builds each runtime, in the order of the table."""
    return {
        "PyTorch fp32, CPU": lambda: _load_torch(checkpoint, "cpu", threads),
        _FRAMEWORK_ON_GPU: lambda: _load_torch(checkpoint, "cuda", threads),
        **_onnx_runtime(source, threads),
        **{f"OpenVINO {each}": partial(_openvino, source, each, threads) for each in openvino.PRECISIONS},
        **_tensorrt(source, stack),
    }


def _onnx_runtime(source: Source, threads: int) -> Mapping[str, Callable[[], Runtime]]:
    plain = source.reference
    fused, dynamic, static = (plain.with_name(f"{name}.onnx") for name in ("fused", "dynamic", "static"))

    def load(path: Path) -> Runtime:
        return Runtime(load_onnx(path, threads=threads, spinning=True))

    def build_fused() -> Runtime:
        _fuse(plain, fused, source.architecture.encoder)
        return load(fused)

    def build_dynamic() -> Runtime:
        _quantize_dynamic(fused, dynamic)
        return load(dynamic)

    def build_static() -> Runtime:
        _check_calibration(source)
        _quantize_static(plain, static, source.calibration)
        return load(static)

    return {
        BASELINE: lambda: load(plain),
        "ONNX Runtime fp32, fused": build_fused,
        "ONNX Runtime int8, fused, dynamic": build_dynamic,
        "ONNX Runtime int8, static": build_static,
    }


def _openvino(source: Source, precision: Precision, threads: int) -> Runtime:
    if (found := openvino.supported_precision(precision)) != precision:
        raise Unavailable(f"this CPU has no {precision}, and would compute in {found}")
    if precision in TARGETS["cpu"].calibrated:
        _check_calibration(source)
    path = source.reference.with_name(f"{precision}.xml")
    openvino.convert(source.reference, path, precision, source.calibration)
    return Runtime(openvino.load(path, precision, source.buckets, threads))


def _tensorrt(source: Source, stack: ExitStack) -> Mapping[str, Callable[[], Runtime]]:
    target, options = TARGETS["tensorrt"], EngineOptions()

    def build(precision: str) -> Runtime:
        target.check_machine(precision, options)
        if precision in target.calibrated:
            _check_calibration(source)
        directory = source.reference.with_name(f"tensorrt-{precision}")
        directory.mkdir()
        engine = target.build(source, directory, precision, options, stack)
        return Runtime(engine.predict, engine.latency)

    def refuse() -> Runtime:
        raise Unavailable(f"needs {', '.join(missing)}")

    if missing := target.diagnose():
        return {"TensorRT": refuse}
    return {f"TensorRT {each}": partial(build, each) for each in target.precisions}


def _check_calibration(source: Source) -> None:
    if not source.calibration:
        raise Unavailable("needs --calibration-data")


def _load_torch(checkpoint: Path, device: str, threads: int) -> Runtime:
    """The checkpoint in the framework that trained it; in float16 on a GPU."""
    try:
        import torch  # noqa: PLC0415  not among the builder's packages
        from transformers import AutoModelForQuestionAnswering  # noqa: PLC0415
    except ImportError as error:
        raise Unavailable(f"{error.name} is not installed") from error
    if device == "cuda" and not torch.cuda.is_available():
        raise Unavailable("torch sees no GPU")
    if threads:
        torch.set_num_threads(threads)
    dtype = torch.float16 if device == "cuda" else torch.float32
    model: Any = AutoModelForQuestionAnswering.from_pretrained(checkpoint, dtype=dtype)
    model.to(device).train(mode=False)

    def predict(window: Window) -> Logits:
        with torch.inference_mode():
            inputs = {name: torch.from_numpy(array).to(device).long() for name, array in window.tensors().items()}
            outputs = model(**inputs)
            start, end = (getattr(outputs, name).float().cpu().numpy() for name in OUTPUT_NAMES)
        return start, end

    return Runtime(predict)


def _fuse(source: Path, destination: Path, encoder: Encoder) -> None:
    from onnxruntime.transformers import optimizer  # noqa: PLC0415  slow to import

    logging.getLogger("onnxruntime.transformers").setLevel(logging.ERROR)  # it warns of graphs that torch did not make
    model = optimizer.optimize_model(
        str(source),
        model_type="bert",
        num_heads=encoder.heads,
        hidden_size=encoder.hidden_size,
        opt_level=0,
    )
    model.save_model_to_file(str(destination))


def _quantize_dynamic(source: Path, destination: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: PLC0415

    quantize_dynamic(
        source,
        destination,
        op_types_to_quantize=["MatMul", "Attention"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},  # shapes of fused operators are not inferred
    )


def _quantize_static(source: Path, destination: Path, calibration: Sequence[Window]) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static  # noqa: PLC0415

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._tensors: Iterator[dict[str, NDArray[np.int32]]] = (window.tensors() for window in calibration)

        def get_next(self) -> dict[str, NDArray[np.int32]] | None:
            return next(self._tensors, None)

    quantize_static(
        source,
        destination,
        Reader(),
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        extra_options={"MatMulConstBOnly": True},  # attention stays in floating point
    )


def _time(
    runtimes: Mapping[str, Runtime], windows: Mapping[int, Sequence[Window]], rounds: int
) -> dict[str, dict[int, float]]:
    """Median milliseconds of every runtime at every length."""
    medians: dict[str, dict[int, float]] = {}
    clocked: dict[str, dict[int, list[float]]] = {}
    for name, runtime in runtimes.items():
        if runtime.latency:
            medians[name] = {length: runtime.latency(batch)["graph_p50"] for length, batch in windows.items()}
        else:
            clocked[name] = {length: [] for length in windows}
    for turn in tqdm(range(rounds), "timing"):
        for length, batch in windows.items():
            window = batch[turn % len(batch)]
            for name, by_length in clocked.items():
                predict = runtimes[name].predict
                time.sleep(PAUSE_S)
                predict(window)
                for _ in range(CALLS):
                    started = time.perf_counter()
                    predict(window)
                    by_length[length].append(time.perf_counter() - started)
    return medians | {
        name: {length: 1e3 * float(np.median(values)) for length, values in by_length.items()}
        for name, by_length in clocked.items()
    }


def _f1(examples: Sequence[Example], count: int, tokenizer: WindowTokenizer, predict: Predict, name: str) -> float:
    chosen = examples[:: max(1, len(examples) // count)][:count] if count else []
    if not chosen:
        return float("nan")
    answered = tqdm(answer_all(chosen, tokenizer, predict), f"F1 of {name}", len(chosen), mininterval=0.5)
    return score(chosen, {example.id: decoded.best.text for example, decoded in answered if decoded.best}).f1


def _print_table(rows: Mapping[str, Row], lengths: Sequence[int]) -> None:
    baseline = rows[BASELINE].milliseconds
    print(f"{platform.machine()}, {cpu_name()}\n")
    print(f"| runtime | {' | '.join(f'{length} tokens' for length in lengths)} | F1 |")
    print("|---|" + "---:|" * (len(lengths) + 1))
    for name, row in rows.items():
        cells = [f"{time:.2f} ms ({baseline[length] / time:.1f}×)" for length, time in row.milliseconds.items()]
        cells += [f"{row.f1:.2f}"] if np.isfinite(row.f1) else [""]
        if row.missing:
            cells = [f"not measured: {row.missing}", *[""] * len(lengths)]
        print(f"| {name} | {' | '.join(cells)} |")


def draw(rows: Mapping[str, Row], path: Path, title: str) -> None:
    """Draw a bar for each runtime and length, the shorter the better; what was not measured says so at its place.

    Args:
        rows: by runtime.
        path: of the PNG file.
        title: of the chart.
    """
    import matplotlib as mpl  # noqa: PLC0415  slow to import, and needed for the chart only
    from matplotlib.figure import Figure  # noqa: PLC0415  without pyplot there is no window to open

    lengths = list(next(row.milliseconds for row in rows.values() if row.milliseconds))
    names = list(rows)
    figure = Figure(figsize=(9, 1.4 + 0.45 * len(names)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(lengths)
    for n, length in enumerate(lengths):
        places = np.arange(len(names)) + (n - (len(lengths) - 1) / 2) * height
        times = [rows[name].milliseconds.get(length, 0.0) for name in names]
        bars = axes.barh(places, times, height, label=f"{length} tokens", color=mpl.colormaps["viridis"]((n + 0.5) / 5))
        axes.bar_label(bars, [f"{time:.2f}" if time else "" for time in times], padding=3, fontsize=8)
    for place, name in enumerate(names):
        if rows[name].missing:
            axes.text(0, place, f"  not measured: {rows[name].missing}", va="center", fontsize=8, color="gray")
    axes.set_yticks(np.arange(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds, median")
    axes.set_title(title)
    axes.legend()
    axes.margins(x=0.1)
    figure.savefig(path, dpi=120)
