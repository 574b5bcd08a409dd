"""Write a teacher's soft labels: ``python -m training.teach squad --init TEACHER --train … --output …``.

The teacher is any checkpoint of transformers that answers questions (or, with ``glue``, that classifies) and reads the
student's tokens. It runs once over the features that a student's job makes of the same flags, in batches of similar
length. The student learns from them with ``--teacher-logits``. With ``horovodrun -np 2`` before it, two processes share
the work. A job that was killed goes on where it was.

There is no loss over hidden states: those of 92,000 windows would take 24 GB for each layer of a teacher of 768.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from training import finetune_glue, squad_features
from training.checkpoints import CheckpointError, digest_of
from training.distillation import (
    FEATURES_PER_FILE,
    TEACHER_FILE,
    Source,
    UnsuitableLogits,
    finish,
    has_shard,
    save_shard,
)
from training.distributed import Workers, start_workers
from training.encoders import EncoderOptions, encoder_source, load_model, load_tokenizer, model_class
from training.glue import TASKS, GlueError, read_glue
from training.inference import predict
from training.loop import at_least_one
from training.squad_data import SquadData, add_data_arguments
from training.squad_evaluation import span_logits

Logits = list[NDArray[np.float32]]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="squad|glue")
    squad = kinds.add_parser("squad", help="the windows of training.finetune_squad with the same flags")
    add_data_arguments(squad)
    squad.set_defaults(data_seed=1)
    glue = kinds.add_parser("glue", help="the training set of training.finetune_glue with the same flags")
    glue.add_argument("--task", choices=list(TASKS), required=True, help="name of the task")
    glue.add_argument("--data", type=Path, required=True, help="directory of the tasks' folders")
    glue.add_argument("--max-seq-len", type=at_least_one, default=128, help="tokens kept of an example")
    for kind in (squad, glue):
        kind.add_argument("--init", required=True, help="the teacher: directory, installed package, hub id")
        kind.add_argument("--output", type=Path, required=True, help="directory of the soft labels")
        kind.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="bf16", help="of matrix products")
        files_help = f"logits in one file, of so many features; default: {FEATURES_PER_FILE}"
        kind.add_argument("--features-per-file", type=at_least_one, default=FEATURES_PER_FILE, help=files_help)
        kind.add_argument("--attention", choices=["auto", "sdpa", "eager"], default="auto", help="fused or plain")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Run the teacher over the features that have no soft labels yet."""
    workers = start_workers()
    args.dropout, args.attention_dropout = 0.0, 0.0
    options = EncoderOptions.of(args)
    model, source, run = (squad_teacher if args.kind == "squad" else glue_teacher)(args, options, workers)
    source = replace(source, per_file=args.features_per_file)
    sha256 = digest_of(dict(sorted(model.state_dict().items())), type(model).__name__)
    if workers.rank == 0:
        print(f"{len(source.rows)} features, {len(source.shards())} files of logits", flush=True)
    try:
        write_logits(args.output, source, sha256, run, workers)
    except (UnsuitableLogits, CheckpointError) as error:
        raise SystemExit(f"--output: {error}") from error
    if workers.rank == 0:
        described = {"sha256": sha256, "init": args.init, "architecture": type(model).__name__}
        finish(args.output, source, described | {"precision": args.precision})
        print(args.output / TEACHER_FILE, flush=True)


def write_logits(
    directory: Path, source: Source, teacher: str, run: Callable[[slice], Logits], workers: Workers
) -> None:
    """Write the shards that are not there yet, each process its share of them; returns when all are written.

    Raises:
        UnsuitableLogits: a shard is damaged or of another teacher, or the teacher's logits are not finite.
        CheckpointError: a file cannot be written.
    """
    left = [number for number in source.shards() if not has_shard(directory, source, teacher, number)]
    workers.gather(None)  # all have looked before the first one writes
    for number in left[workers.rank :: workers.size]:
        save_shard(directory, source, teacher, number, run(source.of_shard(number)))
        print(f"file {number + 1} of {len(source.shards())}", flush=True)
    workers.gather(None)


def squad_teacher(
    args: argparse.Namespace, options: EncoderOptions, workers: Workers
) -> tuple[PreTrainedModel, Source, Callable[[slice], Logits]]:
    """A question-answering model, and the windows of a SQuAD job."""
    place = encoder_source(args.init)
    model = load_model(model_class(place, "question answering"), place, options, trained_head=True)
    nn.Module.to(model, workers.device)
    data = SquadData.of(args, place, model.config)
    collate: Any = squad_features.collate

    def run(part: slice) -> Logits:
        return predict(model, data.features[part], collate, span_logits, workers.device, args.precision)

    return model, data.source, run


def glue_teacher(
    args: argparse.Namespace, options: EncoderOptions, workers: Workers
) -> tuple[PreTrainedModel, Source, Callable[[slice], Logits]]:
    """A model that classifies, and the training set of a GLUE task."""
    place, glue = encoder_source(args.init), TASKS[args.task]
    model = finetune_glue.load_classifier(place, options, glue, args.max_seq_len, trained_head=True)
    nn.Module.to(model, workers.device)
    try:
        examples = read_glue(args.data / glue.name / "train.tsv", glue)
    except GlueError as error:
        raise SystemExit(f"--data: {error}") from error
    features = list(finetune_glue.make_features(examples, load_tokenizer(place), args.max_seq_len))
    collate: Any = finetune_glue.collate

    def run(part: slice) -> Logits:
        return predict(model, features[part], collate, finetune_glue.class_logits, workers.device, args.precision)

    return model, finetune_glue.soft_source(args, features), run


if __name__ == "__main__":
    main(parse_args())
