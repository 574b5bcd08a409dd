"""Test the pre-training job: its model, its recipe, and runs in this process and in 2 and 4 under horovodrun."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from transformers import BertConfig, BertForPreTraining, BertForQuestionAnswering

from bertqa.cli.command import parse
from tests.support.paths import ROOT
from training.encoders import EncoderOptions, load_model
from training.masked_lm import Item, Masked, MaskedBatch, MaskedPairs, collate
from training.metrics import read_metrics
from training.options import PHASES, PretrainArguments
from training.pretrain import PretrainingBert, attention_of, main
from training.shards import MANIFEST_FILE, Pair, ShardManifest, ShardSet, tokenizer_sha256, write_shard

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = 40
EAGER = EncoderOptions(dropout=0.0, attention_dropout=0.0, attention="eager")
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
CURVE = ("loss", "mlm_loss", "mlm_accuracy", "nsp_loss", "nsp_accuracy", "held_out_mlm_loss", "held_out_nsp_loss")


def pair(number: int) -> Pair:
    """Counts on from some word; B goes on where A ended, or begins anew elsewhere. Some words have two tokens."""
    random = np.random.default_rng([1, number])
    first, second = random.integers(3, 11, 2)
    begin, is_random_next = random.integers(WORDS), bool(random.random() < 0.5)
    goes_on = begin + first + (random.integers(5, WORDS - 5) if is_random_next else 0)
    a, b = (len(SPECIAL) + (at + np.arange(count)) % WORDS for at, count in ((begin, first), (goes_on, second)))
    tokens = np.concatenate([[2], a, [3], b, [3]]).astype(np.int32)
    starts = tokens % 4 > 0
    starts[[0, 1, first + 1, first + 2, -1]] = True
    return Pair(tokens, starts, int(first) + 2, is_random_next)


def write_set(directory: Path, shards: Sequence[range], max_seq_len: int = 24) -> Path:
    directory.mkdir()
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *(f"w{word}" for word in range(WORDS))])}
    text = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]")).to_str()
    (directory / "tokenizer.json").write_text(text)
    manifest = ShardManifest(
        storage="parquet",
        tokenizer_sha256=tokenizer_sha256(text),
        vocab_size=len(vocabulary),
        special_tokens={token: vocabulary[token] for token in SPECIAL},
        max_seq_len=max_seq_len,
        max_predictions_per_seq=4,
        short_seq_prob=0.1,
        duplicates=1,
        language="en",
        seed=1,
        shard_bytes=1,
        sources=(),
        shards=tuple(
            write_shard(directory / f"part-{number:05d}.parquet", [pair(row) for row in rows], "parquet", 45)
            for number, rows in enumerate(shards)
        ),
    )
    manifest.write(directory / MANIFEST_FILE)
    return directory


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 sequences to train on and 50 that are held out."""
    return write_set(tmp_path_factory.mktemp("data") / "shards", [range(200), range(200, 400), range(400, 450)])


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(json.dumps(SIZES | {"max_position_embeddings": 32}))
    return path


def flags(shards: Path, output: Path, *more: object, start: Path | None = None) -> list[str]:
    recipe = {"--shards": shards, "--output": output, "--batch-size": 20, "--max-seq-len": 24, "--steps": 6}
    recipe |= {"--max-predictions-per-seq": 4, "--precision": "fp32", "--dropout": 0, "--learning-rate": 0.003}
    recipe |= {"--log-every": 1, "--evaluate-every": 3, "--optimizer": "adamw"}
    return [*(str(part) for item in recipe.items() for part in item), *(str(part) for part in more)]


def pretrain(*argv: Any) -> list[dict[str, Any]]:
    """Run the job in this process; returns its records."""
    args = parse(PretrainArguments, flags(*argv))
    main(args)
    return read_metrics(args.output / "metrics.jsonl")


def curve(records: list[dict[str, Any]]) -> list[float]:
    return [record[name] for record in records for name in CURVE if name in record]


# --- runs


@pytest.fixture(scope="module")
def run(shards: Path, config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A short run of one process: its output and its records."""
    output = tmp_path_factory.mktemp("alone") / "run"
    return output, pretrain(shards, output, "--config", config)


@pytest.mark.slow
@pytest.mark.horovod
@pytest.mark.parametrize("processes", [2, 4])
def test_the_number_of_processes_does_not_change_the_loss_curve(
    processes: int, run: tuple[Path, list[dict[str, Any]]], shards: Path, config: Path, tmp_path: Path
) -> None:
    # Twenty sequences in micro-batches of three: the processes have other numbers of masked tokens each.
    job = [sys.executable, "-m", "training.pretrain", *flags(shards, tmp_path / "run", "--config", config)]
    horovodrun = [str(Path(sys.executable).with_name("horovodrun")), "-np", str(processes), "--gloo"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        [*horovodrun, *job, "--micro-batch-size", "3"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert {record["processes"] for record in records} == {processes}
    assert curve(records) == pytest.approx(curve(run[1]), rel=2e-4)


def test_records_hold_both_losses_and_accuracies_and_those_of_held_out_shards(
    run: tuple[Path, list[dict[str, Any]]],
) -> None:
    output, records = run
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    for record in records:
        assert record["loss"] == pytest.approx(record["mlm_loss"] + record["nsp_loss"], rel=1e-4)
        assert 0 <= record["mlm_accuracy"] <= 1
        assert ("held_out_mlm_loss" in record) == (record["step"] in (3, 6))
    assert records[0]["mlm_loss"] == pytest.approx(np.log(48), rel=0.05)  # of a model that knows nothing
    assert records[0]["nsp_loss"] == pytest.approx(np.log(2), rel=0.1)
    assert (output / "loss.png").stat().st_size > 1000


@pytest.mark.slow
def test_pretraining_learns_words_and_their_order(shards: Path, config: Path, tmp_path: Path) -> None:
    more = ("--config", config, "--steps", 150, "--batch-size", 64, "--learning-rate", 0.01, "--warmup", 0.05)
    last = pretrain(shards, tmp_path / "run", *more, "--log-every", 50, "--evaluate-every", 150)[-1]
    still = ("--config", config, "--steps", 1, "--learning-rate", 1e-12, "--evaluate-every", 1)
    untrained = pretrain(shards, tmp_path / "untrained", *still)[-1]
    assert last["held_out_mlm_loss"] < 0.8 * untrained["held_out_mlm_loss"]
    assert last["held_out_mlm_accuracy"] > untrained["held_out_mlm_accuracy"] + 0.15
    assert last["held_out_nsp_accuracy"] > untrained["held_out_nsp_accuracy"] + 0.1


def test_the_checkpoint_is_one_of_transformers_and_starts_fine_tuning(
    run: tuple[Path, list[dict[str, Any]]], shards: Path
) -> None:
    output, _ = run
    ours = load_model(PretrainingBert, str(output), EAGER)
    loaded: Any = BertForPreTraining.from_pretrained(output, output_loading_info=True)
    theirs, report = loaded
    assert not any(report.values())
    assert theirs.config.vocab_size == 48  # 45 tokens, padded to a multiple of 8
    assert json.loads((output / "config.json").read_text())["architectures"] == ["BertForPreTraining"]
    assert (output / "tokenizer.json").read_bytes() == (shards / "tokenizer.json").read_bytes()
    state = load_file(output / "resume.safetensors")
    assert torch.equal(state["model/bert.embeddings.word_embeddings.weight"], theirs.cls.predictions.decoder.weight)
    assert_equal_scores(ours, theirs, batch_of(range(6)))

    answering = load_model(BertForQuestionAnswering, str(output), EAGER)
    ours_encoder = dict(ours.bert.encoder.named_parameters())
    assert all(torch.equal(ours_encoder[name], p) for name, p in answering.bert.encoder.named_parameters())


def test_no_steps_write_the_weights_that_a_run_starts_from(shards: Path, config: Path, tmp_path: Path) -> None:
    assert pretrain(shards, tmp_path / "start", "--config", config, "--steps", 0) == []
    still = ("--steps", 1, "--learning-rate", 1e-9, "--weight-decay", 0)
    pretrain(shards, tmp_path / "run", "--config", config, *still)
    start, run = (load_file(tmp_path / name / "model.safetensors") for name in ("start", "run"))
    assert start.keys() == run.keys()
    assert all(torch.allclose(start[name], run[name], rtol=0, atol=1e-8) for name in start)


def test_phase_2_goes_on_with_the_weights_of_phase_1_and_a_schedule_of_its_own(
    run: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    phase1, _ = run
    longer = write_set(tmp_path / "shards", [range(60), range(60, 80)], max_seq_len=32)
    more = ("--phase", 2, "--init", phase1, "--max-seq-len", 32, "--learning-rate", 1e-9, "--optimizer", "nvlamb")
    records = pretrain(longer, tmp_path / "phase2", *more, "--warmup", 0.5, "--weight-decay", 0)
    assert [record["learning_rate"] * 1e9 for record in records] == pytest.approx(
        [1 / 3, 2 / 3, 1, *((1 - step / 6) ** 0.5 for step in (3, 4, 5))], rel=1e-4
    )
    before, after = (load_file(directory / "model.safetensors") for directory in (phase1, tmp_path / "phase2"))
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=1e-7) for name in before)


def test_packing_does_not_change_the_loss_curve(shards: Path, config: Path, tmp_path: Path) -> None:
    more = ("--config", config, "--batch-size", 400, "--steps", 2, "--micro-batch-size", 64)  # all sequences each step
    plain = pretrain(shards, tmp_path / "plain", *more)
    packed = pretrain(shards, tmp_path / "packed", *more, "--packing")
    assert curve(packed) == pytest.approx(curve(plain), rel=2e-4)


def test_a_stopped_run_resumes_to_the_same_weights_bit_for_bit(
    run: tuple[Path, list[dict[str, Any]]], shards: Path, config: Path, tmp_path: Path
) -> None:
    first = pretrain(shards, tmp_path / "run", "--config", config, "--stop-after", 4)
    assert len(first) == 4
    state, stopped = (load_file(tmp_path / "run" / name) for name in ("resume.safetensors", "model.safetensors"))
    assert all(torch.equal(state[f"model/{name}"], stopped[name]) for name in stopped)
    both = pretrain(shards, tmp_path / "run", "--config", config)
    assert curve(both) == curve(run[1])
    expected, found = (load_file(directory / "model.safetensors") for directory in (run[0], tmp_path / "run"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_without_next_sentences_their_head_is_left_alone(shards: Path, config: Path, tmp_path: Path) -> None:
    records = pretrain(shards, tmp_path / "run", "--config", config, "--no-nsp", "--weight-decay", 0.5)
    assert not [name for name in records[-1] if "nsp" in name]
    weights = load_file(tmp_path / "run" / "model.safetensors")
    args = parse(PretrainArguments, flags(shards, tmp_path / "new", "--config", config))
    torch.manual_seed(args.seed)
    new = PretrainingBert(BertConfig.from_dict(json.loads((tmp_path / "run" / "config.json").read_text())))
    for name in ("bert.pooler.dense.weight", "cls.seq_relationship.weight"):
        assert torch.equal(weights[name], new.state_dict()[name])
    assert not torch.equal(weights["cls.predictions.bias"], new.state_dict()["cls.predictions.bias"])


# --- refusals


def test_shards_that_were_made_for_other_sequences_are_refused(shards: Path, config: Path, tmp_path: Path) -> None:
    argv = flags(shards, tmp_path / "run", "--config", config)
    for flag, value, stored in (("--max-seq-len", 128, 24), ("--max-predictions-per-seq", 20, 4)):
        with pytest.raises(SystemExit, match=rf"{flag} {stored}.*{flag} {value}"):
            main(parse(PretrainArguments, [*argv, flag, str(value)]))
    longer = write_set(tmp_path / "longer", [range(30)], max_seq_len=32)
    (tmp_path / "short.json").write_text(json.dumps(SIZES | {"max_position_embeddings": 24}))
    argv = flags(longer, tmp_path / "run", "--max-seq-len", 32, "--config", tmp_path / "short.json")
    with pytest.raises(SystemExit, match=r"--max-seq-len 32.*max_position_embeddings is 24"):
        main(parse(PretrainArguments, argv))
    assert not (tmp_path / "run").exists()


def test_shards_of_another_vocabulary_are_refused(
    run: tuple[Path, list[dict[str, Any]]], shards: Path, tmp_path: Path
) -> None:
    model = PretrainingBert(BertConfig(**SIZES, vocab_size=30522))
    model.save_pretrained(tmp_path / "bert")
    with pytest.raises(SystemExit, match=r"vocabulary of 45 tokens, the model's vocab_size is 30522"):
        main(parse(PretrainArguments, flags(shards, tmp_path / "run", "--init", tmp_path / "bert")))


def test_bad_flags_are_refused_by_their_name(shards: Path, config: Path, tmp_path: Path) -> None:
    argv = flags(shards, tmp_path / "run", "--config", config)
    with pytest.raises(SystemExit, match=r"--batch-size 401: 400 sequences are fewer"):
        main(parse(PretrainArguments, [*argv, "--batch-size", "401"]))
    with pytest.raises(SystemExit, match=r"--held-out-shards 3: .* has 3 shards"):
        main(parse(PretrainArguments, [*argv, "--held-out-shards", "3"]))
    with pytest.raises(SystemExit, match="--config gigantic: neither a file nor one of tiny"):
        main(parse(PretrainArguments, [*argv, "--config", "gigantic"]))
    part = shards / "part-00001.parquet"
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in shards.iterdir():
        content = bytearray(file.read_bytes())
        if file == part:
            content[len(content) // 2] ^= 1
        (broken / file.name).write_bytes(content)
    with pytest.raises(SystemExit, match=r"part-00001.parquet: corrupt"):
        main(parse(PretrainArguments, flags(broken, tmp_path / "run", "--config", config)))


# --- the recipe


def test_phases_have_the_published_recipe() -> None:
    args = parse(PretrainArguments, ["--shards", "s", "--output", "o"])
    assert (args.optimizer, args.decay, args.config) == ("lamb", "poly", "base")
    assert (args.max_seq_len, args.max_predictions_per_seq, args.steps) == (128, 20, 7038)
    assert (args.batch_size, args.learning_rate, args.warmup) == (65536, 6e-3, 0.2843)
    args = parse(PretrainArguments, ["--shards", "s", "--output", "o", "--phase", "2", "--init", "phase1"])
    assert (args.max_seq_len, args.max_predictions_per_seq, args.steps, args.config) == (512, 80, 1563, None)
    assert (args.batch_size, args.learning_rate, args.warmup) == (32768, 4e-3, 0.128)
    assert PHASES[1].steps * PHASES[1].batch_size == pytest.approx(9 * PHASES[2].steps * PHASES[2].batch_size, rel=0.01)


def test_the_learning_rate_follows_the_global_batch_unless_it_is_given() -> None:
    base = ["--shards", "s", "--output", "o", "--batch-size"]
    assert parse(PretrainArguments, [*base, "256"]).learning_rate == pytest.approx(6e-3 / 16)
    assert parse(PretrainArguments, [*base, "1024", "--optimizer", "adamw"]).learning_rate == pytest.approx(2e-4)
    assert parse(PretrainArguments, [*base, "1024", "--optimizer", "adamw"]).decay == "linear"
    assert parse(PretrainArguments, [*base, "256", "--learning-rate", "0.1"]).learning_rate == 0.1
    assert parse(PretrainArguments, [*base, "256", "--epochs", "2"]).steps is None


@pytest.mark.parametrize(
    "more",
    [["--phase", "2"], ["--init", "a", "--config", "tiny"], ["--epochs", "1", "--steps", "2"], ["--steps", "-1"]],
)
def test_flags_that_contradict_each_other_are_refused(more: list[str]) -> None:
    with pytest.raises(SystemExit):
        parse(PretrainArguments, ["--shards", "s", "--output", "o", *more])


# --- the model


def tiny_bert(attention: str) -> PretrainingBert:
    torch.manual_seed(0)
    config = BertConfig(**SIZES, vocab_size=48, max_position_embeddings=32)
    config._attn_implementation = attention
    return PretrainingBert(config).eval()  # type: ignore[no-untyped-call, no-any-return]


def batch_of(rows: Sequence[int], row_tokens: int | None = None) -> MaskedBatch:
    sequences = []
    for row in rows:
        stored = pair(row)
        positions = np.array([1, len(stored.input_ids) - 2])
        sequences.append(Masked(stored, stored.input_ids, positions, stored.input_ids[positions]))
    return collate(sequences, row_tokens=row_tokens)


def scores(model: PretrainingBert, batch: MaskedBatch, attention: str) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode():
        words, sentences = model(
            batch.input_ids,
            attention_of(batch, fused=attention == "sdpa"),
            batch.token_type_ids,
            batch.position_ids,
            batch.masked_positions,
            batch.first_tokens,
        )
    assert sentences is not None
    return words, sentences


def assert_equal_scores(ours: PretrainingBert, theirs: BertForPreTraining, batch: MaskedBatch) -> None:
    """Ours are those of transformers at the positions that have a target."""
    words, sentences = scores(ours.eval(), batch, "eager")  # type: ignore[no-untyped-call]
    with torch.inference_mode():
        expected = theirs.eval()(batch.input_ids, batch.attention_mask, batch.token_type_ids)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(words, expected.prediction_logits.flatten(0, 1)[batch.masked_positions])
    torch.testing.assert_close(sentences, expected.seq_relationship_logits)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@given(rows=st.lists(st.integers(0, 60), min_size=1, max_size=9, unique=True))
@settings(max_examples=20, deadline=None)
def test_packed_sequences_get_the_scores_that_they_get_alone(attention: str, rows: list[int]) -> None:
    model = tiny_bert(attention)
    packed = batch_of(rows, row_tokens=64)
    words, sentences = scores(model, packed, attention)
    # Packing has an order of its own: a sequence is known by its tokens.
    flat = packed.input_ids.flatten()
    for number, (first, length) in enumerate(zip(packed.first_tokens.tolist(), packed.lengths, strict=True)):
        tokens = flat[first : first + length].tolist()
        row = next(row for row in rows if pair(row).input_ids.tolist() == tokens)
        alone_words, alone_sentences = scores(model, batch_of([row]), attention)
        torch.testing.assert_close(words[2 * number : 2 * number + 2], alone_words, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(sentences[number], alone_sentences[0], atol=1e-5, rtol=1e-4)


def test_fused_and_plain_attention_agree() -> None:
    for row_tokens in (None, 64):
        batch = batch_of(range(8), row_tokens)
        for plain, fused in zip(*(scores(tiny_bert(kind), batch, kind) for kind in ("eager", "sdpa")), strict=True):
            torch.testing.assert_close(plain, fused, atol=1e-5, rtol=1e-4)


def test_no_mask_is_made_where_nothing_is_padded() -> None:
    same = [row for row in range(200) if len(pair(row).input_ids) == 16]
    assert attention_of(batch_of(same), fused=True) is None
    padded = batch_of(range(9))
    assert attention_of(padded, fused=False) is padded.attention_mask


def test_what_is_masked_is_drawn_anew_in_every_epoch(shards: Path) -> None:
    pairs = MaskedPairs(ShardSet.open(shards), batch_size=4, seed=1)
    first, again, later = (pairs.collate([Item(epoch, row) for row in range(4)]) for epoch in (0, 0, 1))
    assert torch.equal(first.input_ids, again.input_ids)
    assert not torch.equal(first.input_ids, later.input_ids)
