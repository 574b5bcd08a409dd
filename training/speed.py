"""Measure the speed of a training loop, ours or the Hugging Face ``Trainer``, on the same model and sequences.

Speeds are of whole steps, data loading included, after warm-up steps. For both loops, the MFU counts only the FLOPs
that the model needs: no padding, and vocabulary scores only for masked words.
"""

import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers import (
    BertConfig,
    BertForPreTraining,
    BertForQuestionAnswering,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from bertqa.manifest import TOKENIZER_FILE
from bertqa.squad import read_squad
from bertqa.windows import MAX_SEQ_LEN, WindowTokenizer
from training.batches import Batches
from training.data.documents import write_documents
from training.data.sharding import SPECIAL_TOKENS, write_shard_set
from training.data.text import articles_of
from training.distributed import Alone, Workers
from training.encoders import attention_implementation
from training.finetune_squad import span_task
from training.loop import LoopOptions, Task, train
from training.masked_lm import Item, MaskedPairs
from training.metrics import METRICS_FILE, peak_flops, read_metrics
from training.options import Compression, OptimizerName, Precision
from training.pretrain import PretrainingBert, pretraining_task
from training.shards import MANIFEST_FILE, Pair, ShardManifest, ShardSet, tokenizer_sha256, write_shard
from training.squad_features import Feature, make_features

Layout = Literal["padded to the maximum", "shuffled", "bucketed", "packed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A training setup to measure."""

    loop: Literal["ours", "Trainer"]
    data: Literal["squad", "mlm"]  # fine-tuning on questions, or pre-training with next sentences
    layout: Layout  # of sequences in batches
    precision: Precision = "fp32"
    optimizer: OptimizerName = "adamw"
    batch_size: int = 32  # sequences per process and step
    micro_batch_size: int | None = None  # sequences computed at once; None: all of them
    compression: Compression = "none"
    compile: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """The measurements of a contender."""

    sequences_per_second: float  # of all processes together
    mfu: float
    step_seconds: float
    optimizer_seconds: float  # per step, for the optimizer's update alone, after all gradients are ready
    gpu_bytes: int = 0  # peak GPU memory in use


@dataclass(frozen=True, slots=True)
class Workload:
    """A model size, and sequences for it."""

    config: BertConfig
    tokenizer: Tokenizer
    features: Sequence[Feature]
    shards: ShardSet

    def model(self, contender: Contender) -> torch.nn.Module:
        """Create a model with random weights; the ``Trainer`` gets the unmodified transformers model."""
        torch.manual_seed(0)
        config = self.config_of(contender)
        if contender.data == "squad":
            return BertForQuestionAnswering(config)
        return BertForPreTraining(config) if contender.loop == "Trainer" else PretrainingBert(config)

    def config_of(self, contender: Contender) -> BertConfig:
        """Return the config, with the attention that the loop chooses by default."""
        config = BertConfig.from_dict(self.config.to_dict())
        if contender.loop == "ours":
            dropout = config.attention_probs_dropout_prob
            config._attn_implementation = attention_implementation("auto", contender.precision, dropout)
        return config

    def task(self, contender: Contender, batch_size: int) -> Task[Any, Any]:
        """Return the sequences in the form of our loop, with the given number per step over all processes."""
        config, bucketed = self.config_of(contender), contender.layout == "bucketed"
        if contender.data == "squad":
            lengths = [len(feature.input_ids) for feature in self.features]
            return span_task(self.features, Batches(lengths, batch_size, seed=1, by_length=bucketed), config)
        packed = contender.layout == "packed"
        pairs = MaskedPairs(self.shards, batch_size=batch_size, seed=1, packed=packed)
        task = pretraining_task(config, pairs, nsp=True)
        if bucketed or packed:
            return task
        batches = Batches(self.shards.lengths, batch_size, seed=1, by_length=False)
        return replace(task, items=lambda step: [Item(batches.epoch(step), row) for row in batches(step)])

    def examples(self, contender: Contender) -> list[dict[str, Any]]:
        """Return the sequences in the form of the ``Trainer``."""
        if contender.data == "squad":
            return [
                _example(feature.input_ids, feature.context_offset)
                | {"start_positions": feature.start, "end_positions": feature.end}
                for feature in self.features
            ]
        pairs = [self.shards[row] for row in range(len(self.shards))]
        return [
            _example(pair.input_ids, pair.second) | {"next_sentence_label": int(pair.is_random_next)} for pair in pairs
        ]


def _example(input_ids: np.ndarray[Any, Any], second: int) -> dict[str, Any]:
    segments = [int(position >= second) for position in range(len(input_ids))]
    return {"input_ids": input_ids.tolist(), "token_type_ids": segments}


# --- sequences


def real_features(squad: Path, tokenizer: Tokenizer, count: int) -> list[Feature]:
    """Make ``count`` labelled windows of randomly chosen questions."""
    examples = read_squad(squad)
    order = np.random.default_rng(1).permutation(len(examples))
    window_tokenizer = WindowTokenizer(tokenizer, max_seq_len=MAX_SEQ_LEN)
    features = list(islice(make_features((examples[index] for index in order), window_tokenizer), count))
    if len(features) < count:
        raise SystemExit(f"{squad}: has {len(features)} windows, fewer than --sequences {count}")
    return features


def real_pairs(squad: Path, tokenizer: Path, count: int) -> list[Pair]:
    """Make ``count`` sentence pairs from the paragraphs of a SQuAD file; each article is a document."""
    with tempfile.TemporaryDirectory() as name:
        documents, shards = Path(name) / "documents", Path(name) / "shards"
        documents.mkdir()
        write_documents(documents / "articles.parquet", articles_of(squad))
        write_shard_set([documents], tokenizer, shards)
        found = ShardSet.open(shards)
        if len(found) < count:
            raise SystemExit(f"{squad}: makes {len(found)} sentence pairs, fewer than --sequences {count}")
        return [found[row] for row in range(count)]


def full_features(count: int, tokens: int, vocab_size: int) -> list[Feature]:
    """Make windows of random tokens, all of one length."""
    random = np.random.default_rng(1)
    return [Feature(random.integers(999, vocab_size, tokens, dtype=np.int32), 16, 20, 22) for _ in range(count)]


def full_pairs(count: int, tokens: int, vocab_size: int) -> list[Pair]:
    """Make sentence pairs of random tokens, all of one length."""
    random = np.random.default_rng(1)
    words = np.ones(tokens, dtype=bool)
    ids = random.integers(999, vocab_size, (count, tokens), dtype=np.int32)
    return [Pair(row, words, tokens // 2, bool(number % 2)) for number, row in enumerate(ids)]


def write_pairs(
    pairs: Sequence[Pair], directory: Path, tokenizer: Path, *, max_seq_len: int, max_predictions_per_seq: int
) -> ShardSet:
    """Write a shard set of one shard, and open it."""
    directory.mkdir(parents=True)
    text = tokenizer.read_text()
    vocabulary = Tokenizer.from_str(text).get_vocab(with_added_tokens=True)
    vocab_size = max(vocabulary.values()) + 1
    shard = write_shard(directory / "part-00000.parquet", pairs, "parquet", vocab_size)
    (directory / TOKENIZER_FILE).write_text(text)
    ShardManifest(
        storage="parquet",
        tokenizer_sha256=tokenizer_sha256(text),
        vocab_size=vocab_size,
        special_tokens={token: vocabulary[token] for token in SPECIAL_TOKENS},
        max_seq_len=max_seq_len,
        max_predictions_per_seq=max_predictions_per_seq,
        short_seq_prob=0.0,
        duplicates=1,
        language="en",
        seed=1,
        shard_bytes=shard.bytes,
        sources=(),
        shards=(shard,),
    ).write(directory / MANIFEST_FILE)
    return ShardSet.open(directory)


# --- measuring


def measure(contender: Contender, workload: Workload, workers: Workers, steps: int, warm_up: int = 1) -> Speed:
    """Train for warm-up steps that are not counted, then for steps that are."""
    if contender.loop == "Trainer":
        return _measure_trainer(contender, workload, steps, warm_up)
    return _measure_ours(contender, workload, workers, steps, warm_up)


def _measure_ours(contender: Contender, workload: Workload, workers: Workers, steps: int, warm_up: int) -> Speed:
    batch_size = contender.batch_size * workers.size
    model = workload.model(contender)
    task = workload.task(contender, batch_size)
    items = task.items
    every = math.gcd(steps, warm_up)
    options = LoopOptions(
        steps=steps + warm_up,
        batch_size=batch_size,
        optimizer=contender.optimizer,
        precision=contender.precision,
        micro_batch_size=contender.micro_batch_size,
        compression=contender.compression,
        compile=contender.compile,
        log_every=every,
        save_every=2 * (steps + warm_up),
    )
    # The warm-up steps have batches of the first epoch too; the counted steps cover all of it.
    task = replace(task, items=lambda step: items(step if step < warm_up else step - warm_up))
    torch.nn.Module.to(model, workers.device)
    if workers.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as output, _optimizer_clock(workers.device) as clock:
        train(model, task, options, workers, Path(output), {})
        records = workers.share(read_metrics(Path(output) / METRICS_FILE) if workers.rank == 0 else [])
    counted = [record for record in records if record["step"] > warm_up]
    seconds = [every * batch_size / record["sequences_per_second"] for record in counted]
    work = sum(record["mfu"] * each for record, each in zip(counted, seconds, strict=True))
    return Speed(
        sequences_per_second=steps * batch_size / sum(seconds),
        mfu=work / sum(seconds),
        step_seconds=sum(seconds) / steps,
        optimizer_seconds=statistics.median(clock[warm_up:]),
        gpu_bytes=torch.cuda.max_memory_allocated() if workers.device.type == "cuda" else 0,
    )


def _measure_trainer(contender: Contender, workload: Workload, steps: int, warm_up: int) -> Speed:
    tokens = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=workload.tokenizer, **tokens)  # type: ignore[no-untyped-call]
    collate: Any
    if contender.data == "mlm":
        collate = DataCollatorForLanguageModeling(tokenizer)
    elif contender.layout == "shuffled":
        collate = DataCollatorWithPadding(tokenizer)
    else:
        collate = DataCollatorWithPadding(tokenizer, padding="max_length", max_length=MAX_SEQ_LEN)
    model, examples = workload.model(contender), workload.examples(contender)
    at_once = contender.micro_batch_size or contender.batch_size
    clock = _TrainerClock()

    def run(count: int) -> None:
        with tempfile.TemporaryDirectory() as output:
            arguments = TrainingArguments(
                output_dir=output,
                max_steps=count,
                per_device_train_batch_size=at_once,
                gradient_accumulation_steps=contender.batch_size // at_once,
                use_cpu=not torch.cuda.is_available(),
                bf16=contender.precision == "bf16",
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
            )
            Trainer(model, arguments, data_collator=collate, train_dataset=examples, callbacks=[clock]).train()

    run(warm_up)
    with _optimizer_clock(Alone.device) as optimizer:
        run(steps)
    task = workload.task(replace(contender, loop="ours"), contender.batch_size)
    flops = sum(task.flops(task.collate(task.items(step))) for step in range(steps))
    return Speed(
        sequences_per_second=steps * contender.batch_size / clock.seconds,
        mfu=flops / clock.seconds / peak_flops(Alone.device, contender.precision),
        step_seconds=clock.seconds / steps,
        optimizer_seconds=statistics.median(optimizer),
    )


class _TrainerClock(TrainerCallback):
    """Times the last training from its first step to its last, as `training.loop` does."""

    seconds = math.nan
    _began = math.nan

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.monotonic()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds = time.monotonic() - self._began


@contextmanager
def _optimizer_clock(device: torch.device) -> Iterator[list[float]]:
    """Yield a list that receives the seconds of each optimizer update in this process."""
    seconds: list[float] = []
    began = math.nan

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.monotonic()

    def before(*_: Any) -> None:
        nonlocal began
        began = now()

    def after(*_: Any) -> None:
        seconds.append(now() - began)

    handles = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()


def all_reduce_seconds(workload: Workload, workers: Workers, compression: Compression, repeats: int = 5) -> float:
    """Measure the median seconds to sum all gradients over the processes, with no computation to overlap."""
    contender = Contender(loop="ours", data="mlm", layout="bucketed")
    reduced = _backward_seconds(workload.model(contender), workers, compression, repeats)
    return reduced - _backward_seconds(workload.model(contender), Alone(), compression, repeats)


def _backward_seconds(model: torch.nn.Module, workers: Workers, compression: Compression, repeats: int) -> float:
    torch.nn.Module.to(model, workers.device)
    optimizer = workers.wrap(torch.optim.SGD(model.parameters(), lr=0.0), model, compression)
    seconds = []
    for _ in range(repeats + 1):
        workers.begin_step(optimizer, 1)
        loss = torch.stack([parameter.sum() for parameter in model.parameters()]).sum()
        began = time.monotonic()
        loss.backward()  # type: ignore[no-untyped-call]
        with workers.reduced_gradients(optimizer):
            if workers.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.monotonic() - began)
            optimizer.step()
    return statistics.median(seconds[1:])
