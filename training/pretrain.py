"""Pre-train a BERT, from scratch or from a checkpoint: ``horovodrun -np 2 python -m training.pretrain --shards …``.

The job trains masked words and next sentences together, as in Devlin et al. 2018, section 3.1, by NVIDIA's recipe for
LAMB: phase 1 on sequences of 128 tokens, then phase 2 on 512, a separate run that starts from the weights of phase 1.
Every number of the recipe is a flag. The learning rate is for the *global* batch: if ``--batch-size`` differs from the
recipe and ``--learning-rate`` is not given, the rate is scaled by the square root. The output directory becomes a
``BertForPreTraining`` checkpoint for transformers and for ``--init`` of this job and the fine-tuning jobs. A run ended
by ``--stop-after`` also writes one.
"""

if __name__ == "__main__":  # before the slow imports, which --help does not need
    from bertqa.cli.command import run
    from training.commands import pretrain_app

    run(pretrain_app, "python -m training.pretrain")

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers import BertConfig, BertForPreTraining

from bertqa.manifest import TOKENIZER_FILE
from training.distributed import Workers, start_workers
from training.encoders import (
    EncoderOptions,
    bert_flops,
    encoder_source,
    load_model,
    write_checkpoint,
)
from training.loop import LoopOptions, Task, autocast, micro_batches, to_device, train
from training.masked_lm import Item, MaskedBatch, MaskedPairs, block_diagonal
from training.options import SIZES, Precision, PretrainArguments
from training.shards import ShardError, ShardMismatch, ShardSet


def main(args: PretrainArguments) -> None:
    """Open the shards, check that they fit the model, train, and write the checkpoint."""
    workers, encoder = start_workers(), EncoderOptions.of(args)
    torch.manual_seed(args.seed)
    try:
        shards = ShardSet.open(args.shards, hashed=workers.rank == 0)
        model = make_model(args, encoder, shards)
        check(args, shards, model.config)
        training, held_out = split(shards, args.held_out_shards)
    except (ShardError, ShardMismatch) as error:
        raise SystemExit(str(error)) from error
    try:
        pairs = MaskedPairs(training, batch_size=args.batch_size, seed=args.seed, packed=args.packing)
    except ValueError as error:
        raise SystemExit(f"--batch-size {args.batch_size}: {error}") from error
    if not args.nsp:  # parameters without a gradient take no step and no weight decay, on any number of processes
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".pooler." not in name and ".seq_relationship." not in name)
    torch.nn.Module.to(model, workers.device)  # transformers' wrapper has no type signature
    steps = max(round((args.epochs or 0) * pairs.per_epoch), 1) if args.steps is None else args.steps
    options = LoopOptions.of(args, steps)
    if workers.rank == 0:
        weights = sum(parameter.numel() for parameter in model.parameters())
        print(
            f"{weights / 1e6:.1f} million weights, {len(training)} sequences, {options.steps} steps of "
            f"{options.batch_size}, so {options.steps / pairs.per_epoch:.2f} epochs",
            flush=True,
        )

    task = pretraining_task(model.config, pairs, nsp=args.nsp)
    evaluate = evaluator(args, workers, model, task, held_out) if held_out else None
    task = replace(task, evaluate=evaluate, evaluate_every=args.evaluate_every)
    identity = {name: getattr(args, name) for name in ("init", "config", "packing", "nsp")}
    identity |= encoder.identity() | {"shards": [shard.sha256 for shard in training.manifest.shards]}
    complete = train(model, task, options, workers, args.output, identity)
    if (complete or args.stop_after) and workers.rank == 0:  # so that an unfinished model can be tried out
        # Parameters, not the state: the head shares the embeddings' matrix, which is listed only once.
        parameters = dict(model.named_parameters())
        tokenizer = (args.shards / TOKENIZER_FILE).read_text()
        write_checkpoint(args.output, BertForPreTraining.__name__, model.config, parameters, tokenizer)


def make_model(args: PretrainArguments, options: EncoderOptions, shards: ShardSet) -> "PretrainingBert":
    """Load the model of ``--init``, or create a new one for the tokenizer of the shards."""
    if args.init:
        return load_model(PretrainingBert, encoder_source(args.init), options)
    vocabulary = -(-shards.manifest.vocab_size // args.pad_vocabulary) * args.pad_vocabulary
    config = new_config(args.config or "base", vocabulary)
    config.pad_token_id = shards.manifest.special_tokens["[PAD]"]
    config.hidden_dropout_prob, config.attention_probs_dropout_prob = options.dropout, options.attention_dropout
    config._attn_implementation = options.attention
    return PretrainingBert(config)


def new_config(name: str, vocab_size: int) -> BertConfig:
    """Return the config of one of `SIZES`, or of a ``config.json``, with another vocabulary size."""
    if name not in SIZES:
        if not Path(name).is_file():
            raise SystemExit(f"--config {name}: neither a file nor one of {', '.join(SIZES)}")
        config = BertConfig.from_json_file(name)
        config.vocab_size = vocab_size
        return config
    layers, hidden = SIZES[name]
    return BertConfig(
        vocab_size=vocab_size,
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden,
    )


def check(args: PretrainArguments, shards: ShardSet, config: BertConfig) -> None:
    """Refuse shards that were not made for the model or the flags.

    Raises:
        ShardMismatch: the message names both values.
    """
    tokenizer = Path(encoder_source(args.init)) / TOKENIZER_FILE if args.init else None
    shards.check_model(
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        type_vocab_size=config.type_vocab_size,
        tokenizer=tokenizer.read_text() if tokenizer and tokenizer.is_file() else None,
        max_seq_len=args.max_seq_len,
        max_predictions_per_seq=args.max_predictions_per_seq,
    )


def split(shards: ShardSet, held_out: int | None) -> tuple[ShardSet, ShardSet | None]:
    """Split the shards into those to train on and the last ones, which are only used for evaluation."""
    every = shards.manifest.shards
    count = min(len(every) - 1, 1) if held_out is None else held_out
    if not 0 <= count < len(every):
        raise SystemExit(
            f"--held-out-shards {count}: {shards.directory} has {len(every)} shards, and at least one must be left"
        )
    if not count:
        return shards, None
    parts = (replace(shards.manifest, shards=part) for part in (every[:-count], every[-count:]))
    training, last = (ShardSet(shards.directory, manifest) for manifest in parts)
    return training, last


class PretrainingBert(BertForPreTraining):  # type: ignore[no-untyped-call]
    """A ``BertForPreTraining`` whose heads compute only tokens with a target: a seventh of all, and each [CLS]."""

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        token_type_ids: torch.Tensor,
        position_ids: torch.Tensor,
        masked_positions: torch.Tensor,
        first_tokens: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute vocabulary scores of the masked tokens, and scores of "B follows A" and "B is random" of each [CLS].

        Args:
            input_ids: (rows, length).
            attention_mask: result of `attention_of`; None if all tokens attend to each other.
            token_type_ids: (rows, length).
            position_ids: (rows, length).
            masked_positions: flat indexes, (masked tokens,).
            first_tokens: flat indexes, (sequences,); None to leave next sentences out.

        Returns:
            (masked tokens, vocabulary) and (sequences, 2).
        """
        encoded = self.bert(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
        )
        hidden = encoded.last_hidden_state.flatten(0, 1)
        words = self.cls.predictions(hidden[masked_positions])
        if first_tokens is None:
            return words, None
        assert self.bert.pooler is not None
        # The encoder's own pooler takes the first token of a row, but a packed row has several sequences.
        return words, self.cls.seq_relationship(self.bert.pooler(hidden[first_tokens].unsqueeze(1)))


def pretraining_task(config: BertConfig, pairs: MaskedPairs, *, nsp: bool) -> Task[Item, MaskedBatch]:
    """Describe the task to the loop: masked words, and next sentences unless ``nsp`` is False."""
    fused = config._attn_implementation == "sdpa"

    def loss(model: torch.nn.Module, batch: MaskedBatch) -> torch.Tensor:
        words, sentences = model(
            input_ids=batch.input_ids,
            attention_mask=attention_of(batch, fused=fused),
            token_type_ids=batch.token_type_ids,
            position_ids=batch.position_ids,
            masked_positions=batch.masked_positions,
            first_tokens=batch.first_tokens if nsp else None,
        )
        sums = _sums(words, batch.labels)
        return torch.stack([*sums, *_sums(sentences, batch.next_sentence)] if nsp else sums)

    def targets(batch: MaskedBatch) -> list[int]:
        masked, sequences = len(batch.labels), len(batch.lengths)
        return [masked, masked, sequences, sequences] if nsp else [masked, masked]

    def flops(batch: MaskedBatch) -> float:
        hidden, sequences = config.hidden_size, len(batch.lengths)
        heads = len(batch.labels) * hidden * (hidden + config.vocab_size)
        return bert_flops(config, batch.lengths, heads + (sequences * hidden * (hidden + 2) if nsp else 0))

    terms = {"mlm_loss": 1.0, "mlm_accuracy": 0.0}
    return Task(
        items=pairs.items,
        collate=pairs.collate,
        loss=loss,
        targets=targets,
        flops=flops,
        terms=terms | {"nsp_loss": 1.0, "nsp_accuracy": 0.0} if nsp else terms,
    )


def attention_of(batch: MaskedBatch, *, fused: bool) -> torch.Tensor | None:
    """Build the attention mask: None without padding, per key if rows have one sequence, otherwise per pair of tokens.

    Args:
        batch: batch of any layout.
        fused: whether the mask is for torch's fused attention, which takes booleans; plain attention adds the mask to
            its scores.
    """
    rows, length = batch.input_ids.shape
    if len(batch.lengths) == rows:
        return None if sum(batch.lengths) == rows * length else batch.attention_mask
    allowed = block_diagonal(batch.sequence_ids)
    if fused:
        return allowed
    return torch.zeros(allowed.shape, device=allowed.device).masked_fill(~allowed, torch.finfo(torch.float32).min)


def _sums(logits: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    """Return the sum of the cross entropies, and the number of labels with the highest score."""
    return [
        functional.cross_entropy(logits.float(), labels, reduction="sum"),
        (logits.detach().argmax(-1) == labels).sum().float(),
    ]


def evaluator(
    args: PretrainArguments,
    workers: Workers,
    model: PretrainingBert,
    task: Task[Item, MaskedBatch],
    shards: ShardSet,
) -> Callable[[], dict[str, float]]:
    """Create a function that computes the means of the task's terms over a fixed set of held-out sequences."""
    pairs = MaskedPairs(shards, batch_size=1, seed=0)
    rows = np.linspace(0, len(shards) - 1, min(len(shards), args.evaluate_on)).astype(int)
    rows = rows[np.argsort(shards.lengths[rows], kind="stable")]
    items = [Item(epoch=0, row=row) for row in rows.tolist()]
    precision: Precision = args.precision

    def evaluate() -> dict[str, float]:
        sums = torch.zeros(len(task.terms), dtype=torch.float64)
        counts = torch.zeros_like(sums)
        model.eval()  # type: ignore[no-untyped-call]
        for piece in micro_batches(items, args.micro_batch_size, workers.rank, workers.size):
            if piece:
                batch = to_device(pairs.collate(piece), workers.device)
                with torch.inference_mode(), autocast(precision, workers.device):
                    sums += task.loss(model, batch).cpu()
                counts += torch.tensor(task.targets(batch))
        model.train()
        total = workers.sum([*sums.tolist(), *counts.tolist()])
        means = (value / count for value, count in zip(total, total[len(sums) :], strict=False))
        return {f"held_out_{name}": mean for name, mean in zip(task.terms, means, strict=True)}

    return evaluate
