"""Which CPU runtime serves a checkpoint fastest, and what it costs in F1: prints a Markdown table.

    python -m engine_builder.compare_runtimes --checkpoint checkpoints/minilm-l6-squad --data dev-v1.1.json

All runtimes see the same real windows, one at a time, in turns within one run, so that a busy minute slows all alike.
"""

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from tqdm import tqdm

from bertqa.manifest import BundleMismatch, Settings
from bertqa.squad import Example, MalformedSquad, Predict, answer_all, read_squad, score
from bertqa.windows import Window, WindowMaker
from engine_builder.bert_onnx import build_graph
from engine_builder.build import calibration_windows, window_maker
from engine_builder.checkpoint import (
    CALIBRATION_FILE,
    CONFIG_FILE,
    BertConfig,
    InvalidCheckpoint,
    find_checkpoint,
    read_weights,
)
from engine_builder.gate import load_onnx
from engine_builder.openvino_build import PRECISIONS, Precision, convert, load

BASELINE = "ONNX Runtime fp32"
WINDOWS_PER_LENGTH = 8
CALLS = 5  # measured calls in a row, after one that is not
PAUSE_S = 0.02  # until the idle threads of the runtime before have stopped spinning


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m engine_builder.compare_runtimes", description=__doc__)
    parser.add_argument("--checkpoint", required=True, metavar="DIR_OR_HUB_ID", help="BERT for question answering")
    parser.add_argument("--data", required=True, type=Path, metavar="SQUAD_JSON", help="windows and questions")
    parser.add_argument(
        "--calibration-data", type=Path, metavar="SQUAD_JSON", help=f"for int8; default: {CALIBRATION_FILE} of DIR"
    )
    parser.add_argument("--questions", type=int, default=500, help="how many to measure F1 on; 0: none; default: 500")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each runtime at each length; default: 10")
    parser.add_argument("--threads", type=int, default=0, help="cores for each runtime; default: all")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Build every variant, time them side by side, score them, print the table."""
    checkpoint = find_checkpoint(args.checkpoint)
    config = BertConfig.read(checkpoint / CONFIG_FILE)
    maker = window_maker(checkpoint, Settings.of_checkpoint(checkpoint), config)
    examples = read_squad(args.data)
    calibration = calibration_windows(read_squad(args.calibration_data or checkpoint / CALIBRATION_FILE), maker)
    with tempfile.TemporaryDirectory() as directory:
        plain = Path(directory) / "plain.onnx"
        onnx.save(build_graph(config, read_weights(checkpoint, config)), plain)
        runtimes: dict[str, Predict] = {}
        for name, build in tqdm(_variants(plain, config, maker, calibration, args.threads).items(), "building"):
            runtimes[name] = build()
        windows = {length: _windows(examples, maker, length) for length in maker.buckets}
        medians = _time(runtimes, windows, args.rounds)
        scores = {name: _f1(examples, args.questions, maker, predict, name) for name, predict in runtimes.items()}
    _print_table(medians, scores)


def _variants(
    plain: Path, config: BertConfig, maker: WindowMaker, calibration: Sequence[Window], threads: int
) -> Mapping[str, Callable[[], Predict]]:
    fused = plain.with_name("fused.onnx")
    dynamic = plain.with_name("dynamic.onnx")
    static = plain.with_name("static.onnx")

    def build_fused() -> Predict:
        _fuse(plain, fused, config)
        return load_onnx(fused, threads=threads, spinning=True)

    def build_dynamic() -> Predict:
        _quantize_dynamic(fused, dynamic)
        return load_onnx(dynamic, threads=threads, spinning=True)

    def build_static() -> Predict:
        _quantize_static(plain, static, calibration)
        return load_onnx(static, threads=threads, spinning=True)

    def openvino(precision: Precision) -> Callable[[], Predict]:
        def build() -> Predict:
            path = plain.with_name(f"{precision}.xml")
            convert(plain, path, precision, calibration)
            return load(path, precision, maker.buckets, threads)

        return build

    return {
        BASELINE: lambda: load_onnx(plain, threads=threads, spinning=True),
        "ONNX Runtime fp32, fused": build_fused,
        "ONNX Runtime int8, fused, dynamic": build_dynamic,
        "ONNX Runtime int8, static": build_static,
        **{f"OpenVINO {precision}": openvino(precision) for precision in PRECISIONS},
    }


def _fuse(source: Path, destination: Path, config: BertConfig) -> None:
    from onnxruntime.transformers import optimizer  # noqa: PLC0415  slow to import

    logging.getLogger("onnxruntime.transformers").setLevel(logging.ERROR)  # it warns of graphs that torch did not make
    model = optimizer.optimize_model(
        str(source),
        model_type="bert",
        num_heads=config.num_attention_heads,
        hidden_size=config.hidden_size,
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


def _windows(examples: Sequence[Example], maker: WindowMaker, length: int) -> list[Window]:
    """Full windows of a length, spread over the data; contexts are joined where one alone is too short."""
    step = max(1, len(examples) // WINDOWS_PER_LENGTH)
    windows = []
    for first in range(0, len(examples), step):
        contexts = dict.fromkeys(example.context for example in islice(examples, first, first + 64))
        made = maker(
            examples[first].question,
            "\n".join(contexts),
            max_seq_len=length,
            max_question_tokens=min(maker.max_question_tokens, length // 2),
            overlap=0,
        ).windows
        windows += [window for window in made[:1] if window.length == length]
    return windows[:WINDOWS_PER_LENGTH]


def _time(
    runtimes: Mapping[str, Predict], windows: Mapping[int, Sequence[Window]], rounds: int
) -> dict[str, dict[int, float]]:
    """Median milliseconds of every runtime at every length."""
    seconds: dict[str, dict[int, list[float]]] = {name: {length: [] for length in windows} for name in runtimes}
    for turn in tqdm(range(rounds), "timing"):
        for length, batch in windows.items():
            window = batch[turn % len(batch)]
            for name, predict in runtimes.items():
                time.sleep(PAUSE_S)
                predict(window)
                for _ in range(CALLS):
                    started = time.perf_counter()
                    predict(window)
                    seconds[name][length].append(time.perf_counter() - started)
    return {
        name: {length: 1e3 * float(np.median(values)) for length, values in by_length.items()}
        for name, by_length in seconds.items()
    }


def _f1(examples: Sequence[Example], count: int, maker: WindowMaker, predict: Predict, name: str) -> float:
    chosen = examples[:: max(1, len(examples) // count)][:count] if count else []
    if not chosen:
        return float("nan")
    answered = tqdm(answer_all(chosen, maker, predict), f"F1 of {name}", len(chosen), mininterval=0.5)
    return score(chosen, {example.id: decoded.best.text for example, decoded in answered if decoded.best}).f1


def _print_table(medians: Mapping[str, Mapping[int, float]], scores: Mapping[str, float]) -> None:
    lengths = list(medians[BASELINE])
    print(f"| runtime | {' | '.join(f'{length} tokens' for length in lengths)} | F1 |")
    print("|---|" + "---:|" * (len(lengths) + 1))
    for name, by_length in medians.items():
        cells = [
            f"{by_length[length]:.2f} ms ({medians[BASELINE][length] / by_length[length]:.1f}×)" for length in lengths
        ]
        print(f"| {name} | {' | '.join(cells)} | {scores[name]:.2f} |")


if __name__ == "__main__":
    try:
        main(parse_args())
    except (InvalidCheckpoint, BundleMismatch, MalformedSquad, OSError) as error:
        sys.exit(f"compare_runtimes: {error}")
