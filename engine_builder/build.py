"""Build an engine, measure it, and publish it as a version of the model that Triton serves.

python -m engine_builder --checkpoint checkpoints/minilm-l6-squad --target cpu
"""

import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import cast

import onnx
from tqdm import tqdm

from bertqa.manifest import (
    MODEL_NAME,
    QUESTIONS_FILE,
    SETTINGS_FILE,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    Manifest,
    Settings,
    Target,
    sha256_of,
)
from bertqa.squad import Example, read_squad
from bertqa.windows import BUCKETS, Window, WindowMaker
from engine_builder import openvino_build, tensorrt_build
from engine_builder.bert_onnx import build_graph
from engine_builder.checkpoint import (
    CALIBRATION_FILE,
    CONFIG_FILE,
    GATE_FILE,
    BertConfig,
    InvalidCheckpoint,
    find_checkpoint,
    read_weights,
)
from engine_builder.engine import Engine, Source, full_windows
from engine_builder.gate import Measured, check_f1, check_logits, check_tokenizer, load_onnx, measure
from engine_builder.publish import (
    BuildRefused,
    Publication,
    Published,
    building,
    publish,
    write_questions,
)
from engine_builder.tensorrt_build import TensorRTOptions

PRECISIONS: dict[Target, tuple[str, ...]] = {"cpu": openvino_build.PRECISIONS, "tensorrt": tensorrt_build.PRECISIONS}
MAX_LOGIT_ERRORS = {"fp32": 0.001, "fp16": 0.01, "bf16": 0.1, "int8": 0.25, "fp8": 0.25}
"""Of an engine that computes the right thing, as a share of the logits' standard deviation; a few times what was
measured (docs/benchmarks.md)."""
CALIBRATION_WINDOWS = 64
"""Windows that int8 and fp8 ranges are measured on; more take longer and move F1 by less than its noise."""
MIN_TRITON = "2.49.0"
"""The first whose poll mode leaves the versions alone that did not change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """What a build needs to know; the fields are the flags of the command line."""

    checkpoint: str  # directory or hub id
    target: Target
    precision: str | None = None  # `default_precision`
    repository: Path = Path("model_repository")
    model: str = MODEL_NAME
    version: int | None = None  # one above the latest
    activate: bool = False
    gate_data: Path | None = None  # gate.json of the checkpoint
    calibration_data: Path | None = None  # calibration.json of the checkpoint
    max_f1_loss: float = 0.5  # percentage points below the float32 checkpoint
    max_logit_error: float | None = None  # of `MAX_LOGIT_ERRORS`
    instances: int | None = None  # None: as the model has it, or the defaults of `Serving`
    threads: int | None = None  # of each instance; 0 is all cores
    gpus: tuple[int, ...] | None = None
    max_batch_size: int = 1  # windows in one call
    optimization_level: int | None = None  # this and the rest: for TensorRT alone
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False

    @property
    def publication(self) -> Publication:
        """Those of the flags that say where it goes and how it is served."""
        return Publication(**{each.name: getattr(self, each.name) for each in fields(Publication)})

    @property
    def tensorrt(self) -> TensorRTOptions:
        """Those that only TensorRT's builder knows."""
        return TensorRTOptions(**{each.name: getattr(self, each.name) for each in fields(TensorRTOptions)})


def build(options: BuildOptions) -> Manifest:
    """Build and publish; a refused build leaves the repository as it was.

    Raises:
        BuildRefused, InvalidCheckpoint, BundleMismatch, MalformedSquad, GateFailed: nothing was published.
    """
    started = time.monotonic()
    precision = _precision(options)
    options.publication.next_version()
    checkpoint = find_checkpoint(options.checkpoint)
    settings = Settings.of_checkpoint(checkpoint)
    if not (checkpoint / SETTINGS_FILE).exists():  # the directory of a hub snapshot is named after its commit
        settings = replace(settings, name=Path(options.checkpoint).resolve().name)
    config = BertConfig.read(checkpoint / CONFIG_FILE)
    maker = window_maker(checkpoint, settings, config)
    gate_file = _data_file(options.gate_data, checkpoint / GATE_FILE, "--gate-data")
    gate = read_squad(gate_file)
    if not any(example.context.strip() for example in gate):
        raise BuildRefused(f"--gate-data: {gate_file} holds no question over a text")
    check_tokenizer(maker, gate)
    calibration: list[Window] = []
    calibrated = options.calibration_data or (checkpoint / CALIBRATION_FILE).is_file()
    if options.precision is None and precision == "int8" and not calibrated:
        _say(f"the checkpoint has no {CALIBRATION_FILE}; building fp32 (int8 with --calibration-data is faster)")
        precision = "fp32"
    if precision in tensorrt_build.CALIBRATED:
        file = _data_file(options.calibration_data, checkpoint / CALIBRATION_FILE, "--calibration-data")
        calibration = calibration_windows(read_squad(file), maker)
        if not calibration:
            raise BuildRefused(f"--calibration-data: {file} holds no question over a text")

    with building() as directory, ExitStack() as stack:
        reference = directory.parent / "float32.onnx"
        with tqdm(total=2, bar_format="{desc}: {n_fmt}/{total_fmt} [{elapsed}]") as steps:
            steps.set_description("exporting the graph")
            weights = read_weights(checkpoint, config)
            onnx.save(build_graph(config, weights), reference)
            steps.update()
            steps.set_description(f"building the {precision} engine")
            source = Source(
                config=config, weights=weights, reference=reference, buckets=maker.buckets, calibration=calibration
            )
            engine = _build_engine(source, directory, precision, options, stack)
            steps.update()
        measured = measure(gate, maker, engine.predict, load_onnx(reference, threads=options.threads or 0))
        check_f1(measured, options.max_f1_loss, _floating(options.target, precision))
        limit = options.max_logit_error
        check_logits(measured, MAX_LOGIT_ERRORS[precision] if limit is None else limit)
        write_questions(directory / QUESTIONS_FILE, gate[:64], maker, engine.predict)
        latency_ms = {
            str(length): engine.latency(full_windows(gate, maker, length))
            for length in tqdm(maker.buckets, "latency", unit=" lengths")
        }
        shutil.copy(checkpoint / TOKENIZER_FILE, directory)
        manifest = Manifest(
            name=settings.name,
            target=options.target,
            precision=precision,
            engine_file=engine.file,
            engine_sha256=engine.sha256,
            tokenizer_sha256=sha256_of(directory / TOKENIZER_FILE),
            checkpoint_sha256=sha256_of(checkpoint / WEIGHTS_FILE),
            onnx_sha256=engine.onnx_sha256,
            vocabulary_size=config.vocab_size,
            max_seq_len=settings.max_seq_len,
            overlap=settings.overlap,
            max_question_tokens=settings.max_question_tokens,
            null_threshold=settings.null_threshold,
            exact_match=round(measured.engine.exact_match, 3),
            f1=round(measured.engine.f1, 3),
            reference_f1=round(measured.reference.f1, 3),
            gate_questions=len(gate),
            gate_data=f"{gate_file.name} {sha256_of(gate_file)}",
            runtime=engine.runtime,
            built=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            triton=(MIN_TRITON, ""),
            latency_ms=latency_ms,
            cpu_features=engine.cpu_features,
            buckets=maker.buckets,
            max_batch_size=engine.max_batch_size,
        )
        published = publish(directory, manifest, options.publication)
    _summary(published, options.publication, measured, time.monotonic() - started)
    return published.manifest


def _floating(target: Target, precision: str) -> list[str]:
    """Other precisions of a target, in floating point, that may lose less than this one."""
    if precision == "fp32":
        return []  # loses nothing
    return [name for name in PRECISIONS[target] if name not in (precision, *tensorrt_build.CALIBRATED)]


def default_precision(target: Target) -> str:
    """What is built on this machine where no precision is asked for."""
    return openvino_build.default_precision() if target == "cpu" else tensorrt_build.DEFAULT_PRECISION


def window_maker(checkpoint: Path, settings: Settings, config: BertConfig) -> WindowMaker:
    """The checkpoint's tokenizer with its limits, checked against the weights.

    Raises:
        InvalidCheckpoint: the tokenizer is missing or has more tokens than the model, or a window is too long for it.
    """
    longest = config.max_position_embeddings
    if settings.max_seq_len > longest:
        raise InvalidCheckpoint(
            f"{checkpoint}: max_seq_len of bertqa.json is {settings.max_seq_len}, but max_position_embeddings of "
            f"{CONFIG_FILE} is {longest}"
        )
    fits = next((length for length in BUCKETS if settings.max_seq_len <= length <= longest), longest)
    buckets = [length for length in BUCKETS if length < fits] + [fits]  # a longer one would be memory for nothing
    try:
        maker = WindowMaker.from_directory(
            checkpoint,
            max_seq_len=settings.max_seq_len,
            max_question_tokens=settings.max_question_tokens,
            overlap=settings.overlap,
            buckets=buckets,
        )
    except ValueError as error:
        raise InvalidCheckpoint(str(error)) from error
    if maker.vocabulary_size > config.vocab_size:
        raise InvalidCheckpoint(
            f"{checkpoint / TOKENIZER_FILE}: has {maker.vocabulary_size} tokens, but vocab_size of {CONFIG_FILE} is "
            f"{config.vocab_size}; it belongs to another checkpoint"
        )
    return maker


def calibration_windows(examples: Sequence[Example], maker: WindowMaker) -> list[Window]:
    """Up to `CALIBRATION_WINDOWS` windows, spread evenly over the questions."""
    chosen = examples[:: max(1, len(examples) // CALIBRATION_WINDOWS)]
    windows = [window for example in chosen for window in maker(example.question, example.context).windows[:1]]
    return windows[:CALIBRATION_WINDOWS]


def _precision(options: BuildOptions) -> str:
    """The precision to build at, once it is clear that this machine can.

    Raises:
        BuildRefused: a flag does not go with the target, or the machine lacks what the target needs.
    """
    target, precision = options.target, options.precision or default_precision(options.target)
    if precision not in PRECISIONS[target]:
        raise BuildRefused(f"--precision {precision}: --target {target} has {', '.join(PRECISIONS[target])}")
    if target == "tensorrt":
        cache = options.timing_cache
        if cache and not cache.absolute().parent.is_dir():
            raise BuildRefused(f"--timing-cache {cache}: there is no such directory to write it in")
        tensorrt_build.check_machine(cast(tensorrt_build.Precision, precision), options.tensorrt)
        return precision
    unused = ["gpus"] if options.gpus is not None else []
    own = (each for each in fields(TensorRTOptions) if each.name != "max_batch_size")
    unused += [each.name for each in own if getattr(options, each.name) != each.default]
    if unused:
        raise BuildRefused(f"--{unused[0].replace('_', '-')}: only for --target tensorrt")
    supported = openvino_build.supported_precision(cast(openvino_build.Precision, precision))
    if supported != precision:
        faster = " (--precision int8 is faster)" if openvino_build.adds_int8_fast() else ""
        _say(f"this CPU has no {precision}; building {supported} instead{faster}")
    elif precision == "int8" and not openvino_build.adds_int8_fast():
        _say("this CPU has no int8 instructions; --precision fp32 is faster")
    elif precision == "bf16" and not openvino_build.multiplies_bf16_fast():
        _say(f"this CPU multiplies bf16 without AMX; --precision {openvino_build.default_precision()} is faster")
    return supported


def _build_engine(source: Source, directory: Path, precision: str, options: BuildOptions, stack: ExitStack) -> Engine:
    if options.target == "tensorrt":
        kind = cast(tensorrt_build.Precision, precision)
        return tensorrt_build.build(source, directory, kind, options.tensorrt, stack)
    cpu_precision = cast(openvino_build.Precision, precision)
    return openvino_build.build(source, directory, cpu_precision, options.threads or 0, options.max_batch_size)


def _data_file(given: Path | None, default: Path, flag: str) -> Path:
    path = given or default
    if not path.is_file():
        raise BuildRefused(
            f"{flag}: {given} is no file" if given else f"{flag}: needed, because the checkpoint has no {default.name}"
        )
    return path


def _summary(published: Published, where: Publication, measured: Measured, seconds: float) -> None:
    manifest = published.manifest
    next_step = (
        ""
        if published.active
        else (
            f"\n  not active yet: bertqa models load {where.model} {published.directory.name}, then check, then switch"
        )
    )
    # where there is a CUDA graph, Triton runs that
    latencies = ", ".join(
        f"{length}: {each.get('graph_p50', each['p50']):.2f}" for length, each in manifest.latency_ms.items()
    )
    _say(
        f"{published.directory}: {manifest.identity}\n"
        f"  F1 {manifest.f1:.2f} (float32 {manifest.reference_f1:.2f}), EM {manifest.exact_match:.2f}, "
        f"on {manifest.gate_questions} questions\n"
        f"  same span as float32 for {measured.same_spans:.1%}, logits off by {measured.logit_error:.2%} "
        f"(at most {measured.max_logit_error:.3f})\n"
        f"  ms for one window of so many tokens, median: {latencies}\n"
        f"  {sum(file.stat().st_size for file in published.directory.iterdir()) / 1e6:.0f} MB, built in {seconds:.0f} s"
        + next_step
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr)
