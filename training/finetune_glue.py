"""Fine-tune an encoder on a GLUE task: ``python -m training.finetune_glue --task MRPC --data … --output …``.

The recipe is that of Devlin et al. 2018, section 4.1: the pooled vector of [CLS] through dropout and one linear layer,
AdamW, linear warm-up then linear decay to zero. With ``horovodrun -np 2`` before it, two processes share each step. The
output directory becomes a checkpoint. It also gets the development-set metrics in ``training_report.json``, and the
test-set predictions in the format of the benchmark's server.

With ``--teacher-logits`` the model also learns from a teacher's answers, see `training.teach`.
"""

if __name__ == "__main__":  # before the slow imports, which --help does not need
    from bertqa.cli.command import run
    from training.commands import glue_app

    run(glue_app, "python -m training.finetune_glue")

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.processors import BertProcessing
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel

from training.batches import Batches
from training.checkpoints import save_json
from training.distillation import (
    Source,
    TeacherLogits,
    distilled_identity,
    divergence,
    fingerprint,
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
    load_tokenizer,
    longest_input,
    model_class,
    write_checkpoint,
)
from training.glue import TASKS, Example, GlueError, GlueTask, predictions, read_glue, score, write_submission
from training.inference import predict
from training.loop import LoopOptions, Task, train
from training.options import GlueArguments, Precision, TeachGlueArguments

TOKENIZED_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class Feature:
    """A tokenized example: ``[CLS] text [SEP]``, or ``[CLS] text [SEP] other text [SEP]``."""

    input_ids: NDArray[np.int32]  # (tokens,)
    first: int  # number of tokens before the second text
    truncated: bool
    label: int | float  # class or score; 0 in a test set


@dataclass(frozen=True, slots=True)
class Batch:
    """Features padded to one length; int64 of shape (features, length)."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    token_type_ids: torch.Tensor
    labels: torch.Tensor  # (features,), int64 classes or float32 scores
    soft: torch.Tensor | None  # float32 (features, classes or 1), the teacher's logits
    lengths: tuple[int, ...]  # tokens of each feature


def main(args: GlueArguments) -> None:
    """Train, report the development-set metrics, predict the test set, and write the checkpoint."""
    workers = start_workers()
    glue = TASKS[args.task]
    try:
        sets = read_sets(args.data / glue.name, glue)
    except GlueError as error:
        raise SystemExit(f"--data: {error}" if workers.rank == 0 else 1) from error
    torch.manual_seed(args.seed)
    source, encoder = encoder_source(args.init), EncoderOptions.of(args)
    model = load_classifier(source, encoder, glue, args.max_seq_len)
    torch.nn.Module.to(model, workers.device)  # transformers' wrapper has no type signature
    tokenizer = load_tokenizer(source)
    features = {name: list(make_features(examples, tokenizer, args.max_seq_len)) for name, examples in sets.items()}
    training = features["train"]
    if len(training) < args.batch_size:
        raise SystemExit(f"--data: {len(training)} examples are fewer than one batch of --batch-size {args.batch_size}")
    options = LoopOptions.of(args, max(round(args.epochs * (len(training) // args.batch_size)), 1))
    if workers.rank == 0:
        sizes = ", ".join(f"{name} {len(rows)}" for name, rows in sets.items())
        print(f"{glue.name}: {sizes} examples, {options.steps} steps", flush=True)
    identity = {name: getattr(args, name) for name in ("task", "init", "max_seq_len")}
    teacher = read_teacher(args, soft_source(args, training))
    identity |= encoder.identity() | distilled_identity(args, teacher)
    task = label_task(training, model.config, options, teacher, args.temperature, args.soft_share)
    if not train(model, task, options, workers, args.output, identity | {"features": len(training)}):
        return

    report: dict[str, object] = {
        "arguments": {name: str(value) for name, value in vars(args).items()},
        "truncated": {name: sum(feature.truncated for feature in rows) for name, rows in features.items()},
    }
    for name, rows in features.items():
        if name == "train":
            continue
        predicted = predictions(glue, predict_all(model, rows, workers, args.precision))
        if name.startswith("dev"):
            report[name] = score(glue, predicted, np.array([row.label for row in rows])) | {"total": len(rows)}
        elif workers.rank == 0:
            submission = f"{glue.name}{glue.sections[name.removeprefix('test')]}.tsv"
            write_submission(args.output / submission, glue, sets[name], predicted)
    if workers.rank == 0:
        write_checkpoint(args.output, type(model).__name__, model.config, half(model), tokenizer.to_str())
        save_json(args.output / "training_report.json", report)
        print(json.dumps(report, indent=1), flush=True)


def load_classifier(
    source: str, options: EncoderOptions, glue: GlueTask, max_seq_len: int, *, trained_head: bool = False
) -> PreTrainedModel:
    """Load an encoder with a head for a task's classes, or for its score.

    Raises:
        SystemExit: there is no such encoder, or it has fewer than ``max_seq_len`` positions.
    """
    labels = glue.labels or ("score",)
    model = load_model(
        model_class(source, "sequence classification"),
        source,
        options,
        trained_head=trained_head,
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
    )
    if max_seq_len > (longest := longest_input(model.config)):
        raise SystemExit(f"--max-seq-len {max_seq_len}: the encoder reads at most {longest} tokens")
    return model


def soft_source(args: GlueArguments | TeachGlueArguments, training: Sequence[Feature]) -> Source:
    """Describe the features that a training set's soft labels belong to."""
    return Source(
        kind=args.task,
        features=fingerprint((feature.input_ids, feature.first) for feature in training),
        rows=(1,) * len(training),
        settings={"max_seq_len": args.max_seq_len},
    )


def read_sets(directory: Path, glue: GlueTask) -> dict[str, list[Example]]:
    """Read a task's sets by file name: training, development, and test if there are files.

    Raises:
        GlueError: a file is missing or corrupt.
    """
    sets = {"train": read_glue(directory / "train.tsv", glue)}
    for section in glue.sections:
        sets[f"dev{section}"] = read_glue(directory / f"dev{section}.tsv", glue)
    for section in glue.sections:
        path = directory / f"test{section}.tsv"
        if path.exists():
            sets[f"test{section}"] = read_glue(path, glue, labelled=False)
    return sets


def make_features(examples: Sequence[Example], tokenizer: Tokenizer, max_seq_len: int) -> Iterator[Feature]:
    """Tokenize examples; if two texts are too long together, the longer one is cut first.

    Raises:
        ValueError: the tokenizer has no [CLS] or [SEP].
    """
    tokenizer = Tokenizer.from_str(tokenizer.to_str())  # a copy, because the changes below would be saved with it
    sep, cls = tokenizer.token_to_id("[SEP]"), tokenizer.token_to_id("[CLS]")
    if sep is None or cls is None:
        raise ValueError("the tokenizer has no [CLS] or no [SEP]")
    tokenizer.post_processor = BertProcessing(("[SEP]", sep), ("[CLS]", cls))
    tokenizer.encode_special_tokens = True  # "[SEP]" in a text is text
    tokenizer.enable_truncation(max_seq_len, strategy="longest_first")
    tokenizer.no_padding()
    for begin in range(0, len(examples), TOKENIZED_AT_ONCE):
        part = examples[begin : begin + TOKENIZED_AT_ONCE]
        texts = [example.texts if len(example.texts) == 2 else example.texts[0] for example in part]
        for example, encoding in zip(part, tokenizer.encode_batch_fast(texts), strict=True):
            types = encoding.type_ids
            yield Feature(
                input_ids=np.array(encoding.ids, np.int32),
                first=len(types) - sum(types),
                truncated=bool(encoding.overflowing),
                label=0 if example.label is None else example.label,
            )


def collate(features: Sequence[Feature], multiple: int = 8, soft: Sequence[NDArray[np.float16]] | None = None) -> Batch:
    """Pad features to a common length; [PAD] is token 0 as in every BERT.

    Args:
        features: features of the batch.
        multiple: round the length up to a multiple of this, in tokens.
        soft: a teacher's logits of each feature, (1, classes or 1).
    """
    lengths = tuple(len(feature.input_ids) for feature in features)
    input_ids = np.zeros((len(features), -(-max(lengths) // multiple) * multiple), dtype=np.int64)
    attention_mask, token_type_ids = np.zeros_like(input_ids), np.zeros_like(input_ids)
    for row, feature in enumerate(features):
        input_ids[row, : lengths[row]] = feature.input_ids
        attention_mask[row, : lengths[row]] = 1
        token_type_ids[row, feature.first : lengths[row]] = 1
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(attention_mask),
        token_type_ids=torch.from_numpy(token_type_ids),
        labels=torch.tensor([feature.label for feature in features]),
        soft=None if soft is None else torch.from_numpy(np.concatenate(soft).astype(np.float32)),
        lengths=lengths,
    )


def label_task(
    features: Sequence[Feature],
    config: PreTrainedConfig,
    options: LoopOptions,
    teacher: TeacherLogits | None = None,
    temperature: float = 1.0,
    soft_share: float = 0.0,
) -> Task[int, Batch]:
    """Describe the training set to the loop; its items are the examples' indexes.

    Args:
        features: all examples.
        config: config of the model.
        options: options of the loop.
        teacher: teacher logits to learn in addition to the labels.
        temperature: temperature of the teacher's distribution.
        soft_share: weight of the teacher's distribution in the loss.
    """
    lengths = [len(feature.input_ids) for feature in features]
    head = config.hidden_size * config.hidden_size  # the pooler, for one token each; the linear layer is negligible
    return Task(
        items=Batches(lengths, options.batch_size, seed=options.seed),
        collate=lambda indexes: collate(
            [features[index] for index in indexes], soft=[teacher[index] for index in indexes] if teacher else None
        ),
        loss=lambda model, batch: label_loss(model, batch, temperature),
        targets=lambda batch: [len(batch.lengths)] * (2 if teacher else 1),
        flops=lambda batch: bert_flops(config, batch.lengths, head * len(batch.lengths)),
        terms=loss_terms(teacher, soft_share),
    )


def label_loss(model: torch.nn.Module, batch: Batch, temperature: float = 1.0) -> torch.Tensor:
    """Compute the cross entropy of classes, or the squared error of scores, summed over the batch.

    With a teacher's logits, a second term is the divergence from them, or the squared error.

    Returns:
        float32 of shape (terms,).
    """
    logits: torch.Tensor = forward(model, batch).logits.float()
    if batch.labels.is_floating_point():
        terms = [functional.mse_loss(logits[:, 0], batch.labels, reduction="sum")]
        if batch.soft is not None:
            terms.append(functional.mse_loss(logits, batch.soft, reduction="sum"))
    else:
        terms = [functional.cross_entropy(logits, batch.labels, reduction="sum")]
        if batch.soft is not None:
            terms.append(divergence(logits, batch.soft, temperature))
    return torch.stack(terms)


def class_logits(output: Any) -> torch.Tensor:
    """Return the logits of a model's output, (examples, 1, classes or 1)."""
    logits: torch.Tensor = output.logits
    return logits[:, None]


def predict_all(
    model: PreTrainedModel, features: Sequence[Feature], workers: Workers, precision: Precision
) -> NDArray[np.float32]:
    """Compute the logits of all features, (features, classes or 1); each process computes a share and gets all."""
    mine = features[workers.rank :: workers.size]
    progress = "example" if workers.rank == 0 else None
    found = predict(model, mine, collate, class_logits, workers.device, precision, progress=progress)
    rows: dict[int, NDArray[np.float32]] = {}
    for rank, share in enumerate(workers.gather(found)):
        rows |= {rank + workers.size * number: row[0] for number, row in enumerate(share)}
    return np.stack([rows[index] for index in range(len(features))])
