"""Fine-tune an encoder on SQuAD: ``horovodrun -np 2 python -m training.finetune_squad --train … --output …``.

The recipe is that of Devlin et al. 2018, section 4.2: AdamW, linear warm-up then linear decay to zero, gradients
clipped at norm 1. One optimizer step sees ``--batch-size`` windows over all processes together, so the number of
processes changes the speed and not the run. The output directory becomes a checkpoint that the engine builder takes.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from bertqa.manifest import SETTINGS_FILE, Settings
from bertqa.spans import Decoded, Logits
from bertqa.squad import (
    Example,
    MalformedSquad,
    answer_all,
    as_squad,
    exact_match,
    f1,
    read_squad,
    score,
    score_by_kind,
)
from bertqa.windows import MAX_QUESTION_TOKENS, MAX_SEQ_LEN, OVERLAP, Window, WindowMaker
from training.batches import Batches
from training.checkpoints import save_json
from training.distributed import Workers, start_workers
from training.encoders import (
    EncoderOptions,
    add_encoder_arguments,
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
from training.loop import (
    LoopOptions,
    Precision,
    Task,
    add_loop_arguments,
    at_least_one,
    autocast,
    fraction,
    not_negative,
    train,
)
from training.squad_features import (
    Batch,
    Feature,
    collate,
    hold_back_articles,
    make_features,
    negatives,
)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory of the checkpoint and its resume state")
    parser.add_argument("--name", default="minilm-l6-squad", help="name of the checkpoint in manifests and replies")
    epochs_help = "passes over the windows; may be a fraction; 0 measures and completes what --init has"
    parser.add_argument("--epochs", type=not_negative, default=2.0, help=epochs_help)
    add = parser.add_argument_group("data").add_argument
    add("--train", type=Path, required=True, help="SQuAD training file, v1.1 or v2.0")
    add("--dev", type=Path, help="SQuAD file to report on, once, at the end")
    add("--held-back-articles", type=int, default=20, help="training articles kept for tuning")
    add("--negatives", type=fraction, help="unanswerable questions added, as a share; default: 0.1, for v2.0 none")
    add("--max-questions", type=at_least_one, help="train on a random part of the questions")
    add("--max-seq-len", type=int, default=MAX_SEQ_LEN, help="tokens of a full window")
    add("--max-question-tokens", type=int, default=MAX_QUESTION_TOKENS, help="longer ones are cut")
    add("--overlap", type=int, default=OVERLAP, help="context tokens that neighbouring windows share")
    add_encoder_arguments(parser)
    add_loop_arguments(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Train, tune the null threshold on the held-back articles, report, and write the checkpoint."""
    try:
        documents = {flag: read_squad(path) for flag, path in (("--train", args.train), ("--dev", args.dev)) if path}
    except (OSError, MalformedSquad) as error:
        raise SystemExit(f"--train, --dev: {error}") from error
    workers = start_workers()
    torch.manual_seed(args.seed)
    source, encoder = encoder_source(args.init), EncoderOptions.of(args)
    model = load_model(model_class(source, "question answering"), source, encoder)
    torch.nn.Module.to(model, workers.device)  # transformers' own wrapper of it has lost its signature
    maker = window_maker(args, source, model.config)
    training, held_back = hold_back_articles(documents["--train"], args.held_back_articles)
    if args.max_questions:
        training = random.Random(args.seed).sample(training, min(args.max_questions, len(training)))
    v2 = has_impossible(training)
    if args.negatives is None:
        args.negatives = 0.0 if v2 else 0.1
    examples = training + negatives(training, args.negatives, args.seed)
    features = list(make_features(examples, maker))
    try:
        batches = Batches([len(feature.input_ids) for feature in features], args.batch_size, seed=args.seed)
    except ValueError as error:
        raise SystemExit(f"--train: {error}") from error
    options = LoopOptions.of(args, max(round(args.epochs * batches.per_epoch), 1) if args.epochs else 0)
    if workers.rank == 0:
        print(f"{len(examples)} questions, {len(features)} windows, {options.steps} steps", flush=True)
    identity = {name: getattr(args, name) for name in ("init", "negatives", "max_seq_len", "overlap")}
    identity |= encoder.identity()
    task = span_task(features, batches, model.config)
    if not train(model, task, options, workers, args.output, identity | {"features": len(features)}):
        return

    predict = predictor(model, workers.device, args.precision)
    report: dict[str, object] = {"arguments": {name: str(value) for name, value in vars(args).items()}}
    null_threshold = 0.0
    if held_back:
        probes = held_back if v2 else held_back + negatives(held_back, 1.0, args.seed)
        answered = evaluate(probes, maker, predict, workers)
        null_threshold, quality = fit_null_threshold(answered)
        report["null_threshold"] = {"value": null_threshold, "mean_f1": quality, "questions": len(answered)}
        report["held_back"] = as_report([pair for pair in answered if v2 or pair[0].references], null_threshold)
    if dev := documents.get("--dev"):
        report["dev"] = as_report(evaluate(dev, maker, predict, workers), null_threshold)
    if workers.rank == 0:
        write_checkpoint(args.output, type(model).__name__, model.config, half(model), maker.tokenizer_json())
        settings = {name: getattr(args, name) for name in ("name", "max_seq_len", "overlap", "max_question_tokens")}
        Settings(**settings, null_threshold=round(null_threshold, 4)).write(args.output / SETTINGS_FILE)
        save_json(args.output / "training_report.json", report)
        write_samples(args.output, training, held_back, args.seed)
        print(json.dumps(report, indent=1), flush=True)


def window_maker(args: argparse.Namespace, source: str, config: PreTrainedConfig) -> WindowMaker:
    """The maker of the job's windows, refused where it does not suit the encoder."""
    if args.max_seq_len > (positions := longest_input(config)):
        raise SystemExit(f"--max-seq-len {args.max_seq_len}: {args.init} has {positions} positions")
    try:
        maker = WindowMaker(
            load_tokenizer(source),
            max_seq_len=args.max_seq_len,
            max_question_tokens=args.max_question_tokens,
            overlap=args.overlap,
        )
    except ValueError as error:
        raise SystemExit(f"--max-seq-len, --max-question-tokens, --overlap: {error}") from error
    if maker.vocabulary_size > config.vocab_size:
        raise SystemExit(f"--init {args.init}: {maker.vocabulary_size} tokens, but {config.vocab_size} embeddings")
    return maker


def span_task(features: Sequence[Feature], batches: Batches, config: PreTrainedConfig) -> Task[int, Batch]:
    """The windows as the loop trains on them; its items are their indexes."""
    return Task(
        items=batches,
        collate=lambda indexes: collate([features[index] for index in indexes]),
        loss=span_loss,
        targets=lambda batch: [len(batch.lengths)],
        flops=lambda batch: bert_flops(config, batch.lengths, 2 * config.hidden_size * sum(batch.lengths)),
    )


def span_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Cross entropy of start and end position, halved and summed over the windows; float32 of shape (1,).

    Over [CLS] and the context only, as they are decoded.
    """
    output = forward(model, batch)
    losses = [
        functional.cross_entropy(logits.float().masked_fill(~batch.allowed, -1e9), positions, reduction="sum")
        for logits, positions in ((output.start_logits, batch.starts), (output.end_logits, batch.ends))
    ]
    return ((losses[0] + losses[1]) / 2).unsqueeze(0)


def predictor(
    model: PreTrainedModel, device: torch.device, precision: Precision
) -> Callable[[Window], Logits]:
    """The model as a function from a window to float32 start and end logits of shape (1, length)."""
    model.eval()  # type: ignore[no-untyped-call]

    def predict(window: Window) -> Logits:
        tensors = {name: torch.from_numpy(array).long().to(device) for name, array in window.tensors().items()}
        with torch.inference_mode(), autocast(precision, device):
            output = model(**tensors)
        return output.start_logits.float().cpu().numpy(), output.end_logits.float().cpu().numpy()

    return predict


def evaluate(
    examples: Sequence[Example], maker: WindowMaker, predict: Callable[[Window], Logits], workers: Workers
) -> list[tuple[Example, Decoded]]:
    """Answer the questions, each process its share of them; every process gets all the answers."""
    mine = list(examples)[workers.rank :: workers.size]
    answers = answer_all(tqdm(mine, unit="question", disable=workers.rank != 0, mininterval=5), maker, predict)
    return [pair for share in workers.gather(list(answers)) for pair in share]


def has_impossible(examples: Iterable[Example]) -> bool:
    """Whether these are questions of SQuAD v2.0, of which some have no answer."""
    return any(not example.references for example in examples)


def as_report(answered: Sequence[tuple[Example, Decoded]], null_threshold: float) -> dict[str, float]:
    """EM and F1 of the answers by the official rules.

    For SQuAD v1.1 those of the best spans, "no answer" not allowed. For v2.0 all that its official script prints, with
    "no answer" above the threshold; ``best_exact`` and ``best_f1`` are with the thresholds that suit these very
    questions best.
    """
    examples = [example for example, _ in answered]
    if not has_impossible(examples):
        return asdict(score(examples, {example.id: _text(decoded) for example, decoded in answered}))
    given = ((example, decoded, decoded.null_margin <= null_threshold) for example, decoded in answered)
    report = score_by_kind(examples, {example.id: _text(decoded) if has else "" for example, decoded, has in given})
    for name, measure in (("exact", exact_match), ("f1", f1)):
        report[f"best_{name}_thresh"], report[f"best_{name}"] = fit_null_threshold(answered, measure)
    return report


def fit_null_threshold(
    answered: Sequence[tuple[Example, Decoded]], measure: Callable[[str, str], float] = f1
) -> tuple[float, float]:
    """The threshold with the best mean score over answerable and unanswerable questions, and that in percent.

    The same search as the official SQuAD v2.0 script's ``find_best_thresh``: below its margin a question counts the
    ``measure`` of its best span, above it 1 if it is unanswerable, else 0.
    """
    margins = np.array([decoded.null_margin for _, decoded in answered])
    gains = np.array(
        [
            max(measure(_text(decoded), reference.text) for reference in example.references)
            if example.references
            else -1.0  # lost as soon as the threshold lets it be answered
            for example, decoded in answered
        ]
    )
    order = np.argsort(margins)
    unanswerable = sum(not example.references for example, _ in answered)
    totals = unanswerable + np.concatenate([[0.0], np.cumsum(gains[order])])
    edges = np.concatenate([[margins[order[0]] - 1.0], margins[order], [margins[order[-1]] + 1.0]])
    best = int(np.where(np.diff(edges) > 0, totals, -np.inf).argmax())  # no threshold lies between equal margins
    return float((edges[best] + edges[best + 1]) / 2), float(100 * totals[best] / len(answered))


def _text(decoded: Decoded) -> str:
    return decoded.best.text if decoded.best else ""


def write_samples(directory: Path, training: Sequence[Example], held_back: Sequence[Example], seed: int) -> None:
    """Write the questions that the engine builder measures and calibrates with, so that it needs no other data."""
    chooser = random.Random(seed)
    answerable = [example for example in held_back if example.references]  # the gate asks for the best span
    for name, examples, size in (("gate.json", answerable, 500), ("calibration.json", training, 128)):
        sample = chooser.sample(examples, min(size, len(examples)))
        save_json(directory / name, as_squad(sample))


if __name__ == "__main__":
    main(parse_args())
