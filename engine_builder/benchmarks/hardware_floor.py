"""Measure how fast the encoder could be on this CPU: operations over the peak rate, bytes over the bandwidth.

The operations of a window follow from the encoder's shape; the peak is the best rate of a large matrix product in
OpenVINO, the engine's own runtime, at each precision; the bandwidth that of copying arrays larger than any cache.
Softmax, LayerNorm and GELU are in neither, so no engine reaches this floor.
"""

if __name__ == "__main__":  # before the imports, because --help needs none of them
    from bertqa.cli.command import run
    from engine_builder.benchmarks.commands import floor_app

    run(floor_app, "python -m engine_builder.benchmarks.hardware_floor")


import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openvino as ov
from openvino import opset13 as op

from bertqa.hardware import cpu_features
from bertqa.repository import Repository
from bertqa.squad import read_squad
from engine_builder.architectures import read_architecture
from engine_builder.architectures.encoder import Encoder
from engine_builder.benchmarks.commands import FloorOptions
from engine_builder.checkpoint import GATE_FILE
from engine_builder.targets.openvino import PRECISIONS, Precision, supported_precision

SIDE = 2048
"""Rows and columns of the matrices."""
_BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2, "int8": 1}


def main(args: FloorOptions) -> None:
    """Measure and print the tables."""
    encoder = read_architecture(args.checkpoint).encoder
    bundle = Repository(args.repository).open()
    latency, own = bundle.manifest.latency_ms, bundle.manifest.precision
    precisions = [each for each in PRECISIONS if supported_precision(each) == each]
    peaks = {each: peak_rate(each, args.seconds) for each in precisions}
    bandwidth = copy_rate(args.seconds)
    weights = encoder_weights(encoder)
    print(f"{', '.join(cpu_features())}\n")
    print("| precision | matrix product, 10⁹ operations/s | encoder's weights, MB | read once, ms |")
    print("|---|---:|---:|---:|")
    for each, peak in peaks.items():
        size = _BYTES[each] * weights
        print(f"| {each} | {peak / 1e9:.0f} | {size / 1e6:.1f} | {1e3 * size / bandwidth:.2f} |")
    print(f"\nCopying: {bandwidth / 1e9:.1f} GB/s, read and written bytes counted.\n")
    floors_of = " | ".join(f"floor {each}, ms" for each in peaks)
    print(f"| tokens | 10⁹ operations | {floors_of} | engine, {own}, ms | floor / engine |")
    print("|---:|---:|" + "---:|" * (len(peaks) + 2))
    for bucket in bundle.manifest.buckets:
        floors = {each: 1e3 * floor(encoder, bucket, each, peaks) for each in peaks}
        engine = latency.get(str(bucket), {}).get("p50", float("nan"))
        share = floors.get(own, float("nan")) / engine  # type: ignore[call-overload]
        cells = " | ".join(f"{each:.2f}" for each in floors.values())
        print(f"| {bucket} | {sum(operations(encoder, bucket)) / 1e9:.2f} | {cells} | {engine:.2f} | {share:.0%} |")
    found = Counter(
        window.length
        for example in read_squad(args.checkpoint / GATE_FILE)
        for window in bundle.tokenizer(example.question, example.context).windows
    )
    told = ", ".join(f"{length}: {count / found.total():.0%}" for length, count in sorted(found.items()))
    print(f"\nThe windows of {GATE_FILE} (tokens {told}): at most")
    for each in peaks:
        mean = sum(floor(encoder, length, each, peaks) * count for length, count in found.items()) / found.total()
        print(f"{1 / mean:.0f}/s in {each}")


def floor(encoder: Encoder, length: int, precision: Precision, peaks: Mapping[Precision, float]) -> float:
    """Fewest seconds for a window; the products of attention stay in floating point if the weights are int8."""
    dense, attention = operations(encoder, length)
    floats = max(rate for each, rate in peaks.items() if each != "int8")
    return dense / peaks[precision] + attention / (floats if precision == "int8" else peaks[precision])


def operations(encoder: Encoder, length: int) -> tuple[int, int]:
    """Count multiplications and additions in the matrix products of a window of ``length`` tokens, padding included.

    Returns:
        Those with weights, of each layer and token twice the weights of queries, keys, values and their output, 4 h²,
        and of the feed-forward part, 2 h f, and at the end of two columns for the logits, 2 h; and those of attention,
        of each layer and pair of tokens twice h for their score and twice h for its use.
    """
    h, f, layers = encoder.hidden_size, encoder.intermediate_size, encoder.layers
    return 2 * length * (layers * (4 * h * h + 2 * h * f) + 2 * h), layers * 4 * length * length * h


def encoder_weights(encoder: Encoder) -> int:
    """Count the weights that every window reads: all but the embeddings."""
    h, f = encoder.hidden_size, encoder.intermediate_size
    return encoder.layers * (4 * h * h + 2 * h * f)


def peak_rate(precision: Precision, seconds: float) -> float:
    """Measure operations/s of the fastest product of two square matrices, on all cores."""
    random = np.random.default_rng(0)
    weights = op.constant(random.uniform(-1, 1, (SIDE, SIDE)).astype(np.float32))
    rows = op.parameter([SIDE, SIDE], np.float32)
    if precision == "int8":
        left = op.fake_quantize(rows, *_range(0.0, 255 / 256), 256)
        right = op.fake_quantize(weights, *_range(-1.0, 1.0), 255)
        product = op.matmul(left, right, False, True)
    else:
        product = op.matmul(rows, weights, False, True)
    kind = {"fp32": ov.Type.f32, "bf16": ov.Type.bf16, "int8": ov.Type.f32}[precision]
    compiled = ov.Core().compile_model(
        ov.Model([product], [rows]), "CPU", {"INFERENCE_PRECISION_HINT": kind, "PERFORMANCE_HINT": "LATENCY"}
    )
    request = compiled.create_infer_request()
    inputs = random.uniform(0, 1, (SIDE, SIDE)).astype(np.float32)
    return 2 * SIDE**3 / _shortest(lambda: request.infer([inputs], share_inputs=True), seconds)


def _range(low: float, high: float) -> list[np.float32]:
    return [np.float32(each) for each in (low, high, low, high)]


def copy_rate(seconds: float, mib: int = 256) -> float:
    """Measure bytes/s, read and written, of copying arrays larger than any cache, on two threads."""
    arrays = [(np.ones(mib << 17), np.ones(mib << 17)) for _ in range(2)]
    with ThreadPoolExecutor(len(arrays)) as pool:
        shortest = _shortest(lambda: list(pool.map(lambda pair: np.copyto(*pair), arrays)), seconds)
    return sum(2 * pair[0].nbytes for pair in arrays) / shortest


def _shortest(work: Callable[[], object], seconds: float) -> float:
    work()
    found: list[float] = []
    until = time.perf_counter() + seconds
    while not found or time.perf_counter() < until:
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return min(found)
