"""Fine-tune an encoder on SQuAD: ``horovodrun -np 2 python -m training.finetune_squad --train … --output …``.

The recipe is that of Devlin et al. 2018, section 4.2: AdamW, linear warm-up then linear decay to zero, gradients
clipped at norm 1. One optimizer step uses ``--batch-size`` windows over all processes together, so the number of
processes changes the speed but not the result. The output directory becomes a checkpoint for the engine builder.

With ``--teacher-logits`` the model also learns from a teacher's answers, see `training.teach`.
"""

if __name__ == "__main__":  # before the slow imports, which --help does not need
    from bertqa.cli.command import run
    from training.commands import squad_app

    run(squad_app, "python -m training.finetune_squad")

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel

from bertqa.manifest import SETTINGS_FILE, Settings
from bertqa.spans import Decoded
from bertqa.squad import Example, as_squad
from training.batches import Batches
from training.checkpoints import save_json
from training.distillation import (
    TeacherLogits,
    distilled_identity,
    divergence,
    loss_terms,
    read_teacher,
)
from training.distributed import Workers, start_workers
from training.encoders import (
    EncoderOptions,
    bert_flops,
    encoder_source,
    forward,
    half,
    load_model,
    model_class,
    write_checkpoint,
)
from training.loop import LoopOptions, Task, train
from training.options import SquadArguments
from training.squad_data import SquadData, read_file
from training.squad_evaluation import as_report, evaluate, fit_null_threshold, has_answer_shares, predictor
from training.squad_features import UNLABELLED, Batch, Feature, collate, negatives


def main(args: SquadArguments) -> None:
    """Train, tune the null threshold on the held-back articles, report, and write the checkpoint."""
    dev = read_file(args.dev, "--dev") if args.dev else []
    workers = start_workers()
    torch.manual_seed(args.seed)
    source, encoder = encoder_source(args.init), EncoderOptions.of(args)
    model = load_model(model_class(source, "question answering"), source, encoder)
    torch.nn.Module.to(model, workers.device)  # transformers' wrapper has no type signature
    data = SquadData.of(args, source, model.config)
    args = replace(args, negatives=data.negatives)
    teacher = read_teacher(args, data.source)
    try:
        batches = Batches([len(feature.input_ids) for feature in data.features], args.batch_size, seed=args.seed)
    except ValueError as error:
        raise SystemExit(f"--train: {error}") from error
    options = LoopOptions.of(args, max(round(args.epochs * batches.per_epoch), 1) if args.epochs else 0)
    if workers.rank == 0:
        print(f"{data.examples} questions, {len(data.features)} windows, {options.steps} steps", flush=True)
    identity = {name: getattr(args, name) for name in ("init", "negatives", "max_seq_len", "overlap")}
    identity |= encoder.identity() | distilled_identity(args, teacher) | {"features": len(data.features)}
    task = span_task(data.features, batches, model.config, teacher, args.temperature, args.soft_share)
    if train(model, task, options, workers, args.output, identity):
        complete(model, data, dev, workers, args)


def complete(
    model: PreTrainedModel, data: SquadData, dev: Sequence[Example], workers: Workers, args: SquadArguments
) -> None:
    """Fit the null threshold, report, and write the checkpoint."""
    predict = predictor(model, workers.device, args.precision, progress=workers.rank == 0)
    report: dict[str, object] = {"arguments": {name: str(value) for name, value in vars(args).items()}}
    null_threshold = 0.0
    if data.held_back:
        others = [] if data.v2 else negatives(data.held_back, 1.0, args.data_seed)
        answered = evaluate([*data.held_back, *others, *data.impossible], data.tokenizer, predict, workers)
        null_threshold, quality = fit_null_threshold(answered)
        report["null_threshold"] = {"value": null_threshold, "mean_f1": quality, "questions": len(answered)}
        report["has_answer"] = has_answer_shares(answered, null_threshold, {each.id for each in data.impossible})
        report["held_back"] = as_report(of_file(answered, data), null_threshold)
    if dev:
        report["dev"] = as_report(evaluate(dev, data.tokenizer, predict, workers), null_threshold)
    if workers.rank == 0:
        write_checkpoint(args.output, type(model).__name__, model.config, half(model), data.tokenizer.tokenizer_json())
        settings = {name: getattr(args, name) for name in ("name", "max_seq_len", "overlap", "max_question_tokens")}
        Settings(**settings, null_threshold=round(null_threshold, 4)).write(args.output / SETTINGS_FILE)
        save_json(args.output / "training_report.json", report)
        write_samples(args.output, data.training, data.held_back, args.data_seed)
        print(json.dumps(report, indent=1), flush=True)


def of_file(answered: Sequence[tuple[Example, Decoded]], data: SquadData) -> list[tuple[Example, Decoded]]:
    """Return the answers to the held-back questions that are from the training file itself."""
    own = {example.id for example in data.held_back}
    return [pair for pair in answered if pair[0].id in own]


def span_task(
    features: Sequence[Feature],
    batches: Batches,
    config: PreTrainedConfig,
    teacher: TeacherLogits | None = None,
    temperature: float = 1.0,
    soft_share: float = 0.0,
) -> Task[int, Batch]:
    """Describe the training windows to the loop; its items are the windows' indexes.

    Args:
        features: all windows.
        batches: the global batches of the windows.
        config: config of the model.
        teacher: teacher logits to learn in addition to the labels.
        temperature: temperature of the teacher's distribution.
        soft_share: weight of the teacher's distribution in the loss.
    """

    def batch_of(indexes: Sequence[int]) -> Batch:
        soft = [teacher[index] for index in indexes] if teacher else None
        return collate([features[index] for index in indexes], soft=soft)

    def targets(batch: Batch) -> list[int]:
        labelled = int((batch.starts != UNLABELLED).sum())
        return [labelled, len(batch.lengths)] if teacher else [labelled]

    return Task(
        items=batches,
        collate=batch_of,
        loss=lambda model, batch: span_loss(model, batch, temperature),
        targets=targets,
        flops=lambda batch: bert_flops(config, batch.lengths, 2 * config.hidden_size * sum(batch.lengths)),
        terms=loss_terms(teacher, soft_share),
    )


def span_loss(model: torch.nn.Module, batch: Batch, temperature: float = 1.0) -> torch.Tensor:
    """Compute the mean loss of start and end position, summed over the windows.

    The terms are the cross entropy with the label and, with a teacher's logits, the divergence from them. Like
    decoding, both use only [CLS] and the context.

    Returns:
        float32 of shape (terms,).
    """
    output = forward(model, batch)
    hard, soft = [], []
    for column, (logits, labels) in enumerate(((output.start_logits, batch.starts), (output.end_logits, batch.ends))):
        masked = logits.float().masked_fill(~batch.allowed, -1e9)
        hard.append(functional.cross_entropy(masked, labels, reduction="sum", ignore_index=UNLABELLED))
        if batch.soft is not None:
            taught = batch.soft[:, :, column].masked_fill(~batch.allowed, -1e9)
            soft.append(divergence(masked, taught, temperature))
    return torch.stack([torch.stack(term).sum() / 2 for term in (hard, soft) if term])


def write_samples(directory: Path, training: Sequence[Example], held_back: Sequence[Example], seed: int) -> None:
    """Write the questions for the engine builder's gate and calibration, so that it needs no other data."""
    chooser = random.Random(seed)
    answerable = [example for example in held_back if example.references]  # the gate asks for the best span
    for name, examples, size in (("gate.json", answerable, 500), ("calibration.json", training, 128)):
        sample = chooser.sample(examples, min(size, len(examples)))
        save_json(directory / name, as_squad(sample))
