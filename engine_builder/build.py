"""Build an engine, measure it, and publish it as a new version of the model that Triton serves.

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
    sha256_of,
)
from bertqa.squad import Example, read_squad
from bertqa.targets import TargetName
from bertqa.windows import BUCKETS, Window, WindowTokenizer
from engine_builder.architectures import Architecture, build_graph, read_architecture
from engine_builder.checkpoint import (
    CALIBRATION_FILE,
    CONFIG_FILE,
    GATE_FILE,
    InvalidCheckpoint,
    find_checkpoint,
    read_weights,
)
from engine_builder.engine import Engine, EngineOptions, Source, full_windows
from engine_builder.gate import AccuracyGate, Measured, check_tokenizer, load_onnx, measure
from engine_builder.publish import (
    BuildRefused,
    Publication,
    Published,
    building,
    publish,
    write_questions,
)
from engine_builder.targets import TARGETS, Target

MAX_LOGIT_ERRORS = {"fp32": 0.001, "fp16": 0.01, "bf16": 0.1, "int8": 0.25, "fp8": 0.25}
"""Largest allowed error of the logits, as a share of their standard deviation; a few times what was measured on correct
engines (docs/benchmarks.md)."""
CALIBRATION_WINDOWS = 64
"""Windows used to calibrate int8 and fp8; more take longer and change F1 by less than its noise."""
MIN_TRITON = "2.49.0"
"""The first Triton release whose poll mode does not reload unchanged versions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions(EngineOptions):
    """Options of a build; these fields and those of `EngineOptions` are the command-line flags."""

    checkpoint: str  # directory or hub id
    target: TargetName
    precision: str | None = None  # None: the target's default on this machine
    repository: Path = Path("model_repository")
    model: str = MODEL_NAME
    version: int | None = None  # None: one above the latest
    activate: bool = False
    gate_data: Path | None = None  # None: the checkpoint's gate.json
    calibration_data: Path | None = None  # None: the checkpoint's calibration.json
    max_f1_loss: float = 0.5  # percentage points below the float32 checkpoint
    max_logit_error: float | None = None  # None: from `MAX_LOGIT_ERRORS`
    instances: int | None = None  # None: keep the model's value, or the default of `Serving`; also for threads, gpus

    @property
    def publication(self) -> Publication:
        """The flags that say where to publish and how to serve."""
        return Publication(**{each.name: getattr(self, each.name) for each in fields(Publication)})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Inputs:
    """A checkpoint and its questions, read and checked."""

    checkpoint: Path
    settings: Settings
    architecture: Architecture
    tokenizer: WindowTokenizer
    gate_file: Path
    gate: Sequence[Example]
    calibration: Sequence[Window]  # empty if the precision needs no calibration
    precision: str


def build(options: BuildOptions) -> Manifest:
    """Build and publish an engine; a refused build leaves the repository unchanged.

    Raises:
        BuildRefused, InvalidCheckpoint, BundleMismatch, MalformedSquad, GateFailed: nothing was published.
    """
    started = time.monotonic()
    target = TARGETS[options.target]
    precision = _precision(target, options)
    options.publication.next_version()
    inputs = _read_inputs(options, target, precision)
    with building() as directory, ExitStack() as stack:
        reference = directory.parent / "float32.onnx"
        engine = _build_engine(inputs, target, reference, directory, options, stack)
        measured = measure(
            inputs.gate, inputs.tokenizer, engine.predict, load_onnx(reference, threads=options.threads or 0)
        )
        limit = options.max_logit_error
        gate = AccuracyGate(
            max_f1_loss=options.max_f1_loss,
            max_logit_error=MAX_LOGIT_ERRORS[inputs.precision] if limit is None else limit,
        )
        gate.check(measured, _floating(target, inputs.precision))
        write_questions(directory / QUESTIONS_FILE, inputs.gate[:64], inputs.tokenizer, engine.predict)
        shutil.copy(inputs.checkpoint / TOKENIZER_FILE, directory)
        published = publish(directory, _manifest(inputs, options.target, engine, measured), options.publication)
    _summary(published, options.publication, measured, time.monotonic() - started)
    return published.manifest


def _precision(target: Target, options: BuildOptions) -> str:
    """Check the flags and the machine, and return the precision to build at.

    Raises:
        BuildRefused: a flag does not fit the target, or the machine lacks something that the target needs.
    """
    precision = options.precision or target.default_precision()
    if precision not in target.precisions:
        supported = ", ".join(target.precisions)
        raise BuildRefused(f"--precision {precision}: --target {options.target} supports {supported}")
    defaults = {each.name: each.default for each in fields(EngineOptions)}
    for name, other in TARGETS.items():
        for option in sorted(other.own_options - target.own_options):
            if getattr(options, option) != defaults[option]:
                raise BuildRefused(f"--{option.replace('_', '-')}: only valid with --target {name}")
    return target.check_machine(precision, options)


def _read_inputs(options: BuildOptions, target: Target, precision: str) -> _Inputs:
    """Read and check all inputs before computing anything.

    Raises:
        BuildRefused, InvalidCheckpoint, MalformedSquad, GateFailed: an input is missing or invalid.
    """
    checkpoint = find_checkpoint(options.checkpoint)
    settings = Settings.of_checkpoint(checkpoint)
    if not (checkpoint / SETTINGS_FILE).exists():  # a hub snapshot's directory is named after its commit
        settings = replace(settings, name=Path(options.checkpoint).resolve().name)
    architecture = read_architecture(checkpoint)
    tokenizer = window_tokenizer(checkpoint, settings, architecture)
    gate_file = _data_file(options.gate_data, checkpoint / GATE_FILE, "--gate-data")
    gate = read_squad(gate_file)
    if not any(example.context.strip() for example in gate):
        raise BuildRefused(f"--gate-data: {gate_file} contains no question with a context")
    check_tokenizer(tokenizer, gate)
    has_calibration = options.calibration_data or (checkpoint / CALIBRATION_FILE).is_file()
    if options.precision is None and precision in target.calibrated and not has_calibration:
        _say(
            f"the checkpoint has no {CALIBRATION_FILE}; building {target.uncalibrated} ({precision} with "
            "--calibration-data is faster)"
        )
        precision = target.uncalibrated
    calibration: list[Window] = []
    if precision in target.calibrated:
        file = _data_file(options.calibration_data, checkpoint / CALIBRATION_FILE, "--calibration-data")
        calibration = calibration_windows(read_squad(file), tokenizer)
        if not calibration:
            raise BuildRefused(f"--calibration-data: {file} contains no question with a context")
    return _Inputs(
        checkpoint=checkpoint,
        settings=settings,
        architecture=architecture,
        tokenizer=tokenizer,
        gate_file=gate_file,
        gate=gate,
        calibration=calibration,
        precision=precision,
    )


def _build_engine(
    inputs: _Inputs, target: Target, reference: Path, directory: Path, options: BuildOptions, stack: ExitStack
) -> Engine:
    """Write the float32 graph to ``reference``, and build the engine from it."""
    with tqdm(total=2, bar_format="{desc}: {n_fmt}/{total_fmt} [{elapsed}]") as steps:
        steps.set_description("exporting the graph")
        weights = read_weights(inputs.checkpoint, inputs.architecture)
        onnx.save(build_graph(inputs.architecture, weights), reference)
        steps.update()
        steps.set_description(f"building the {inputs.precision} engine")
        source = Source(
            architecture=inputs.architecture,
            weights=weights,
            reference=reference,
            buckets=inputs.tokenizer.buckets,
            calibration=inputs.calibration,
        )
        engine = target.build(source, directory, inputs.precision, options, stack)
        steps.update()
    return engine


def _manifest(inputs: _Inputs, target: TargetName, engine: Engine, measured: Measured) -> Manifest:
    """Create the manifest of an engine, and measure its latency."""
    tokenizer, settings = inputs.tokenizer, inputs.settings
    latency_ms = {
        str(length): engine.latency(full_windows(inputs.gate, tokenizer, length))
        for length in tqdm(tokenizer.buckets, "latency", unit=" lengths")
    }
    return Manifest(
        name=settings.name,
        target=target,
        precision=inputs.precision,
        engine_file=engine.file,
        engine_sha256=engine.sha256,
        tokenizer_sha256=sha256_of(inputs.checkpoint / TOKENIZER_FILE),
        checkpoint_sha256=sha256_of(inputs.checkpoint / WEIGHTS_FILE),
        onnx_sha256=engine.onnx_sha256,
        vocabulary_size=inputs.architecture.vocab_size,
        max_seq_len=settings.max_seq_len,
        overlap=settings.overlap,
        max_question_tokens=settings.max_question_tokens,
        null_threshold=settings.null_threshold,
        exact_match=round(measured.engine.exact_match, 3),
        f1=round(measured.engine.f1, 3),
        reference_f1=round(measured.reference.f1, 3),
        gate_questions=len(inputs.gate),
        gate_data=f"{inputs.gate_file.name} {sha256_of(inputs.gate_file)}",
        runtime=engine.runtime,
        built=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        triton=(MIN_TRITON, ""),
        latency_ms=latency_ms,
        cpu_features=engine.cpu_features,
        buckets=tokenizer.buckets,
        max_batch_size=engine.max_batch_size,
    )


def _floating(target: Target, precision: str) -> list[str]:
    """Return the target's floating-point precisions that may lose less accuracy than this one."""
    if precision == "fp32":
        return []  # fp32 loses nothing
    return [name for name in target.precisions if name != precision and name not in target.calibrated]


def window_tokenizer(checkpoint: Path, settings: Settings, architecture: Architecture) -> WindowTokenizer:
    """Load the checkpoint's tokenizer with its window settings, and check both against the model.

    Raises:
        InvalidCheckpoint: the tokenizer is missing or has more tokens than the model, or windows are too long for the
            model.
    """
    longest = architecture.max_tokens
    if settings.max_seq_len > longest:
        raise InvalidCheckpoint(
            f"{checkpoint}: max_seq_len of bertqa.json is {settings.max_seq_len}, but max_position_embeddings of "
            f"{CONFIG_FILE} is {longest}"
        )
    fits = next((length for length in BUCKETS if settings.max_seq_len <= length <= longest), longest)
    buckets = [length for length in BUCKETS if length < fits] + [fits]  # longer buckets would only waste memory
    try:
        tokenizer = WindowTokenizer.from_directory(
            checkpoint,
            max_seq_len=settings.max_seq_len,
            max_question_tokens=settings.max_question_tokens,
            overlap=settings.overlap,
            buckets=buckets,
        )
    except ValueError as error:
        raise InvalidCheckpoint(str(error)) from error
    if tokenizer.vocabulary_size > architecture.vocab_size:
        raise InvalidCheckpoint(
            f"{checkpoint / TOKENIZER_FILE}: has {tokenizer.vocabulary_size} tokens, but vocab_size in {CONFIG_FILE} "
            f"is {architecture.vocab_size}; it belongs to another checkpoint"
        )
    return tokenizer


def calibration_windows(examples: Sequence[Example], tokenizer: WindowTokenizer) -> list[Window]:
    """Return up to `CALIBRATION_WINDOWS` windows, spread evenly over the questions."""
    chosen = examples[:: max(1, len(examples) // CALIBRATION_WINDOWS)]
    windows = [window for example in chosen for window in tokenizer(example.question, example.context).windows[:1]]
    return windows[:CALIBRATION_WINDOWS]


def _data_file(given: Path | None, default: Path, flag: str) -> Path:
    path = given or default
    if not path.is_file():
        missing = f"{given} is not a file" if given else f"required, because the checkpoint has no {default.name}"
        raise BuildRefused(f"{flag}: {missing}")
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
    # Triton runs the CUDA graph if there is one
    latencies = ", ".join(
        f"{length}: {each.get('graph_p50', each['p50']):.2f}" for length, each in manifest.latency_ms.items()
    )
    _say(
        f"{published.directory}: {manifest.identity}\n"
        f"  F1 {manifest.f1:.2f} (float32 {manifest.reference_f1:.2f}), EM {manifest.exact_match:.2f}, "
        f"on {manifest.gate_questions} questions\n"
        f"  same span as float32 for {measured.same_spans:.1%}, logits off by {measured.logit_error:.2%} "
        f"(at most {measured.max_logit_error:.3f})\n"
        f"  median ms for one window, by tokens: {latencies}\n"
        f"  {sum(file.stat().st_size for file in published.directory.iterdir()) / 1e6:.0f} MB, built in {seconds:.0f} s"
        + next_step
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr)
