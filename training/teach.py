"""Write a teacher's soft labels: ``bertqa train teach squad --init TEACHER --train … --output …``.

The teacher is any transformers checkpoint for question answering (or, with ``glue``, for classification) that uses the
student's tokens. It runs once over the features that a student's job makes from the same flags, in batches of similar
length. The student learns from them with ``--teacher-logits``. With ``horovodrun -np 2`` before it, two processes share
the work. A killed job resumes where it stopped.

There is no loss over hidden states: for 92,000 windows they would take 24 GB per layer of a teacher of width 768.
"""

if __name__ == "__main__":  # before the slow imports, which --help does not need
    from bertqa.cli.command import run
    from training.commands import teach_app

    run(teach_app, "python -m training.teach")

from collections.abc import Callable
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
    TEACHER_FILE,
    Source,
    UnsuitableLogits,
    finish,
    has_shard,
    save_shard,
)
from training.distributed import Workers, start_workers
from training.encoders import (
    EncoderOptions,
    attention_implementation,
    encoder_source,
    load_model,
    load_tokenizer,
    model_class,
)
from training.glue import TASKS, GlueError, read_glue
from training.inference import predict
from training.options import TeachGlueArguments, TeachSquadArguments
from training.squad_data import SquadData
from training.squad_evaluation import span_logits

Logits = list[NDArray[np.float32]]


def main(args: TeachSquadArguments | TeachGlueArguments) -> None:
    """Run the teacher over the features that have no soft labels yet."""
    workers = start_workers()
    options = EncoderOptions(0.0, 0.0, attention_implementation(args.attention, args.precision, 0.0))
    if isinstance(args, TeachSquadArguments):
        model, source, run = squad_teacher(args, options, workers)
    else:
        model, source, run = glue_teacher(args, options, workers)
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
    """Write the missing shards, each process a share of them; return when all are written.

    Raises:
        UnsuitableLogits: a shard is damaged or from another teacher, or the teacher's logits are not finite.
        CheckpointError: a file cannot be written.
    """
    left = [number for number in source.shards() if not has_shard(directory, source, teacher, number)]
    workers.gather(None)  # all processes have checked before the first one writes
    for number in left[workers.rank :: workers.size]:
        save_shard(directory, source, teacher, number, run(source.of_shard(number)))
        print(f"file {number + 1} of {len(source.shards())}", flush=True)
    workers.gather(None)


def squad_teacher(
    args: TeachSquadArguments, options: EncoderOptions, workers: Workers
) -> tuple[PreTrainedModel, Source, Callable[[slice], Logits]]:
    """Load a question-answering teacher, and make the windows of a SQuAD job."""
    place = encoder_source(args.init)
    model = load_model(model_class(place, "question answering"), place, options, trained_head=True)
    nn.Module.to(model, workers.device)
    data = SquadData.of(args, place, model.config)
    collate: Any = squad_features.collate

    def run(part: slice) -> Logits:
        return predict(model, data.features[part], collate, span_logits, workers.device, args.precision)

    return model, data.source, run


def glue_teacher(
    args: TeachGlueArguments, options: EncoderOptions, workers: Workers
) -> tuple[PreTrainedModel, Source, Callable[[slice], Logits]]:
    """Load a classification teacher, and the training set of a GLUE task."""
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
