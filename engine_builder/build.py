"""Build an engine, measure it, and publish it as a version of the model that Triton serves.

python -m engine_builder --checkpoint checkpoints/minilm-l6-squad --target cpu
"""

import os
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime, timezone
from importlib.metadata import version as version_of
from pathlib import Path

import onnx
from tqdm import tqdm

from bertqa.hardware import cpu_features
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
from bertqa.spans import Logits
from bertqa.squad import Example, Predict, read_squad
from bertqa.windows import BUCKETS, Window, WindowMaker
from engine_builder import openvino_model
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
from engine_builder.gate import Measured, check_f1, check_tokenizer, load_onnx, measure
from engine_builder.openvino_build import (
    CALIBRATION_WINDOWS,
    DEFAULT_PRECISION,
    Precision,
    build_engine,
    supported_precision,
)
from engine_builder.publish import (
    BuildRefused,
    Publication,
    Published,
    building,
    publish,
    write_questions,
)

ENGINE_FILE = "engine.xml"
MIN_TRITON = "2.49.0"
"""The first whose poll mode leaves the versions alone that did not change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """What a build needs to know; the fields are the flags of the command line."""

    checkpoint: str  # directory or hub id
    target: Target
    precision: Precision = DEFAULT_PRECISION
    repository: Path = Path("model_repository")
    model: str = MODEL_NAME
    version: int | None = None  # one above the latest
    activate: bool = False
    gate_data: Path | None = None  # gate.json of the checkpoint
    calibration_data: Path | None = None  # calibration.json of the checkpoint
    max_f1_loss: float = 0.5  # percentage points below the float32 checkpoint
    instances: int | None = None  # None: as the model has it, or the defaults of `Serving`
    threads: int | None = None  # of each instance; 0 is all cores

    @property
    def publication(self) -> Publication:
        """Those of the flags that say where it goes and how it is served."""
        return Publication(**{each.name: getattr(self, each.name) for each in fields(Publication)})


def build(options: BuildOptions) -> Manifest:
    """Build and publish; a refused build leaves the repository as it was.

    Raises:
        BuildRefused, InvalidCheckpoint, BundleMismatch, MalformedSquad, GateFailed: nothing was published.
    """
    if options.target == "tensorrt":
        raise BuildRefused("--target tensorrt: this release has no TensorRT builder yet; --target cpu works")
    started = time.monotonic()
    options.publication.next_version()
    checkpoint = find_checkpoint(options.checkpoint)
    settings = Settings.of_checkpoint(checkpoint)
    if not (checkpoint / SETTINGS_FILE).exists():  # the directory of a hub snapshot is named after its commit
        settings = replace(settings, name=Path(options.checkpoint).resolve().name)
    config = BertConfig.read(checkpoint / CONFIG_FILE)
    maker = window_maker(checkpoint, settings, config)
    gate_file = _data_file(options.gate_data, checkpoint / GATE_FILE, "--gate-data")
    gate = read_squad(gate_file)
    if not gate:
        raise BuildRefused(f"--gate-data: {gate_file} holds no question")
    check_tokenizer(maker, gate)
    precision = supported_precision(options.precision)
    if precision != options.precision:
        _say(f"this CPU has no {options.precision}; building {precision} instead (--precision int8 is faster)")
    calibration: list[Window] = []
    if precision == "int8":
        file = _data_file(options.calibration_data, checkpoint / CALIBRATION_FILE, "--calibration-data")
        calibration = calibration_windows(read_squad(file), maker)
        if not calibration:
            raise BuildRefused(f"--calibration-data: {file} holds no question over a text")

    with building() as directory:
        onnx_file = directory / "model.onnx"
        with tqdm(total=3, bar_format="{desc}: {n_fmt}/{total_fmt} [{elapsed}]") as steps:
            steps.set_description("exporting the graph")
            onnx.save(build_graph(config, read_weights(checkpoint, config)), onnx_file)
            steps.update()
            steps.set_description(f"building the {precision} engine")
            build_engine(onnx_file, directory / ENGINE_FILE, precision, calibration)
            steps.update()
            steps.set_description("compiling it")
            engine = load_engine(directory / ENGINE_FILE, precision, maker.buckets, options.threads or 0)
            steps.update()
        measured = measure(gate, maker, engine, load_onnx(onnx_file, threads=options.threads or 0))
        check_f1(measured, options.max_f1_loss)
        write_questions(directory / QUESTIONS_FILE, gate[:64], maker, engine)
        onnx_sha256 = sha256_of(onnx_file)
        onnx_file.unlink()
        shutil.copy(checkpoint / TOKENIZER_FILE, directory)
        shutil.copy(openvino_model.__file__, directory / "model.py")
        manifest = Manifest(
            name=settings.name,
            target="cpu",
            precision=precision,
            engine_file=ENGINE_FILE,
            engine_sha256=openvino_model.engine_sha256(directory / ENGINE_FILE),
            tokenizer_sha256=sha256_of(directory / TOKENIZER_FILE),
            checkpoint_sha256=sha256_of(checkpoint / WEIGHTS_FILE),
            onnx_sha256=onnx_sha256,
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
            runtime={"python": platform.python_version()}
            | {name: version_of(name) for name in ("openvino", "onnxruntime", "onnx", "nncf")},
            built=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            triton=(MIN_TRITON, ""),
            cpu_features=cpu_features(),
            buckets=maker.buckets,
        )
        published = publish(directory, manifest, options.publication)
    _summary(published, options.publication, measured, time.monotonic() - started)
    return published.manifest


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
    buckets = [length for length in BUCKETS if length <= longest]
    if not buckets or buckets[-1] < settings.max_seq_len:
        buckets.append(longest)
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


def load_engine(path: Path, precision: Precision, buckets: Sequence[int], threads: int) -> Predict:
    """The engine as Triton will run it."""
    engine = openvino_model.Engine(
        path, precision=precision, buckets=buckets, threads=threads or len(os.sched_getaffinity(0))
    )

    def predict(window: Window) -> Logits:
        start, end = engine.infer(window.tensors())
        return start, end

    return predict


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
    _say(
        f"{published.directory}: {manifest.identity}\n"
        f"  F1 {manifest.f1:.2f} (float32 {manifest.reference_f1:.2f}), EM {manifest.exact_match:.2f}, "
        f"on {manifest.gate_questions} questions\n"
        f"  same span as float32 for {measured.same_spans:.1%}, largest logit error {measured.max_logit_error:.3f}\n"
        f"  {sum(file.stat().st_size for file in published.directory.iterdir()) / 1e6:.0f} MB, built in {seconds:.0f} s"
        + next_step
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr)
