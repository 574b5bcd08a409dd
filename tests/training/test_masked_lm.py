"""Test masks, batches and packing: pure functions of their arguments that lose nothing and mix nothing up."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertModel

from training.batches import Batches, pack
from training.masked_lm import Item, Masked, MaskedBatch, MaskedPairs, Masker, block_diagonal, collate
from training.shards import MANIFEST_FILE, Pair, ShardManifest, ShardSet, tokenizer_sha256, write_shard

PAD, UNK, CLS, SEP, MASK = 7, 0, 52, 11, 89  # anywhere in the vocabulary, and no padding by accident
SPECIAL = {"[PAD]": PAD, "[UNK]": UNK, "[CLS]": CLS, "[SEP]": SEP, "[MASK]": MASK}
VOCABULARY = 90
REPLACEMENTS = np.array([token for token in range(VOCABULARY) if token not in SPECIAL.values()], np.int32)


def masker(*, max_predictions: int = 20, seed: int = 1) -> Masker:
    return Masker(mask_id=MASK, replacements=REPLACEMENTS, max_predictions=max_predictions, seed=seed)


def random_pair(tokens: int, chooser: np.random.Generator, *, pieces: float = 0.3) -> Pair:
    second = int(chooser.integers(3, tokens - 1))
    ids = chooser.choice(REPLACEMENTS, tokens)
    ids[[0, second - 1, tokens - 1]] = CLS, SEP, SEP
    starts = chooser.random(tokens) > pieces
    starts[[0, 1, second - 1, second, tokens - 1]] = True
    return Pair(ids, starts, second, bool(chooser.integers(2)))


def words_of(pair: Pair) -> list[set[int]]:
    """The positions of each word, without those of [CLS] and [SEP]."""
    starts = [*np.flatnonzero(pair.word_starts).tolist(), len(pair.input_ids)]
    special = {0, pair.second - 1, len(pair.input_ids) - 1}
    return [set(range(a, b)) for a, b in pairwise(starts) if a not in special]


pairs = st.builds(
    lambda tokens, seed, pieces: random_pair(tokens, np.random.default_rng(seed), pieces=pieces),
    tokens=st.integers(5, 140),
    seed=st.integers(0, 2**32),
    pieces=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
)


# Masks


@given(pair=pairs, max_predictions=st.integers(1, 25), epoch=st.integers(0, 99), row=st.integers(0, 2**40))
def test_whole_words_are_masked_within_the_limits(pair: Pair, max_predictions: int, epoch: int, row: int) -> None:
    masked = masker(max_predictions=max_predictions)(pair, Item(epoch, row))
    wanted = min(max_predictions, max(1, round(0.15 * len(pair.input_ids))))
    positions = set(masked.positions.tolist())
    assert 1 <= len(positions) == len(masked.positions) <= wanted
    assert masked.positions.tolist() == sorted(positions)
    assert masked.labels.tolist() == pair.input_ids[masked.positions].tolist()
    others = np.setdiff1d(np.arange(len(pair.input_ids)), masked.positions)
    assert (masked.input_ids[others] == pair.input_ids[others]).all()
    assert not set(masked.input_ids[masked.positions].tolist()) & {PAD, UNK, CLS, SEP}
    words = words_of(pair)
    assert positions <= set().union(*words)
    whole = [word for word in words if word <= positions]
    if min(map(len, words)) <= wanted:
        assert set().union(*whole) == positions
        left = wanted - len(positions)
        assert not any(len(word) <= left for word in words if word not in whole)  # as many words as fit
    else:
        assert len(positions) == wanted  # a part of one word, where no word is short enough


@given(pair=pairs, epoch=st.integers(0, 9), row=st.integers(0, 9))
def test_masks_are_a_function_of_seed_epoch_and_row_alone(pair: Pair, epoch: int, row: int) -> None:
    mask = masker(seed=7)
    first = mask(pair, Item(epoch, row))
    mask(pair, Item(epoch + 1, row))
    again = masker(seed=7)(pair, Item(epoch, row))
    assert first.input_ids.tolist() == again.input_ids.tolist()
    assert first.positions.tolist() == again.positions.tolist()


def test_seed_epoch_and_row_each_change_the_masks() -> None:
    pair = random_pair(128, np.random.default_rng(0))
    items = [(seed, Item(epoch, row)) for seed in (1, 2) for epoch in (0, 1) for row in (0, 1)]
    drawn = {tuple(masker(seed=seed)(pair, item).positions.tolist()) for seed, item in items}
    assert len(drawn) == 8


def test_of_the_masked_tokens_four_fifths_become_mask_and_a_tenth_stays() -> None:
    mask, chooser = masker(), np.random.default_rng(3)
    pair = random_pair(128, chooser)
    made = [mask(pair, Item(0, row)) for row in range(2000)]
    shown = np.concatenate([masked.input_ids[masked.positions] for masked in made])
    labels = np.concatenate([masked.labels for masked in made])
    assert len(labels) == 2000 * 19
    assert np.mean(shown == MASK) == pytest.approx(0.8, abs=0.01)
    assert np.mean(shown == labels) == pytest.approx(0.1 + 0.1 / len(REPLACEMENTS), abs=0.01)
    replaced = shown[(shown != MASK) & (shown != labels)]
    assert set(replaced.tolist()) == set(REPLACEMENTS.tolist())
    counts = np.bincount(np.concatenate([masked.positions for masked in made]), minlength=128)
    assert counts[[0, pair.second - 1, 127]].sum() == 0


# Packing


lengths_and_capacity = st.integers(8, 512).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(1, capacity), max_size=120), st.just(capacity))
)


@given(lengths_and_capacity)
def test_packing_loses_nothing_and_leaves_no_two_rows_that_fit_into_one(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    rows = pack(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    sums = sorted(sum(lengths[index] for index in row) for row in rows)
    assert all(0 < total <= capacity for total in sums)
    assert len(sums) < 2 or sums[0] + sums[1] > capacity
    assert rows == pack(lengths, capacity)


def test_packing_takes_the_row_that_is_left_fullest() -> None:
    assert pack([50, 60, 40, 70, 30], 100) == [[3, 4], [1, 2], [0]]
    assert pack([], 10) == []
    with pytest.raises(ValueError, match="a sequence of 11 tokens does not fit into a row of 10"):
        pack([3, 11], 10)


def test_packed_rows_of_mixed_lengths_are_nearly_full() -> None:
    lengths = np.random.default_rng(0).integers(10, 128, 1024).tolist()
    assert sum(lengths) / (128 * len(pack(lengths, 128))) > 0.95


def sequences(sizes: list[int]) -> list[Masked]:
    chooser = np.random.default_rng(len(sizes))
    return [masker()(random_pair(size, chooser), Item(0, row)) for row, size in enumerate(sizes)]


@settings(max_examples=50)
@given(st.lists(st.integers(5, 64), min_size=1, max_size=20), st.booleans())
def test_a_batch_holds_every_sequence_once_with_its_targets(sizes: list[int], packed: bool) -> None:
    given_ = sequences(sizes)
    batch = collate(given_, row_tokens=64 if packed else None, pad_id=PAD)
    rows, length = batch.input_ids.shape
    assert rows <= len(sizes)
    assert length % 8 == 0
    assert length <= 64
    assert sum(batch.lengths) == sum(sizes) == int(batch.attention_mask.sum())
    assert torch.equal(batch.attention_mask, (batch.sequence_ids > 0).long())
    assert set(batch.input_ids[batch.attention_mask == 0].tolist()) <= {PAD}
    found = []
    ids, segments, positions, numbers = (
        tensor.flatten() for tensor in (batch.input_ids, batch.token_type_ids, batch.position_ids, batch.sequence_ids)
    )
    for first, size, random_next in zip(
        batch.first_tokens.tolist(), batch.lengths, batch.next_sentence.tolist(), strict=True
    ):
        tokens = slice(first, first + size)
        assert positions[tokens].tolist() == list(range(size))
        assert len(set(numbers[tokens].tolist())) == 1
        inside = (batch.masked_positions >= first) & (batch.masked_positions < first + size)
        found.append(
            (
                ids[tokens].tolist(),
                segments[tokens].tolist(),
                (batch.masked_positions[inside] - first).tolist(),
                batch.labels[inside].tolist(),
                random_next,
            )
        )
    expected = [
        (
            masked.input_ids.tolist(),
            [int(place >= masked.pair.second) for place in range(len(masked.input_ids))],
            masked.positions.tolist(),
            masked.labels.tolist(),
            int(masked.pair.is_random_next),
        )
        for masked in given_
    ]
    assert found == expected if not packed else sorted(found) == sorted(expected)
    tensors = [getattr(batch, name) for name in MaskedBatch.__slots__ if name != "lengths"]
    assert {tensor.dtype for tensor in tensors} == {torch.int64}


@settings(max_examples=20)
@given(st.lists(st.integers(5, 64), min_size=1, max_size=12))
def test_no_token_may_attend_to_another_sequence(sizes: list[int]) -> None:
    batch = collate(sequences(sizes), row_tokens=64)
    allowed = block_diagonal(batch.sequence_ids)
    rows, length = batch.input_ids.shape
    assert allowed.shape == (rows, 1, length, length)
    for row, numbers in enumerate(batch.sequence_ids.tolist()):
        for query, number in enumerate(numbers):
            assert allowed[row, 0, query].tolist() == [other == number for other in numbers]


def test_a_packed_sequence_is_encoded_as_it_is_alone() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    config._attn_implementation = "sdpa"
    model = BertModel(config)
    model.eval()  # type: ignore[no-untyped-call]
    masked = sequences([20, 12, 9, 40, 31, 16])
    packed = collate(masked, row_tokens=64)
    assert len(packed.input_ids) < len(masked)

    def encoded(batch: MaskedBatch, attention: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            output = model(
                input_ids=batch.input_ids,
                attention_mask=attention,
                token_type_ids=batch.token_type_ids,
                position_ids=batch.position_ids,
            )
        hidden: torch.Tensor = output.last_hidden_state.flatten(0, 1)
        return hidden

    together = encoded(packed, block_diagonal(packed.sequence_ids))
    alone = {
        tuple(single.input_ids.tolist()): encoded(batch, batch.attention_mask)[: len(single.input_ids)]
        for single in masked
        for batch in [collate([single])]
    }
    ids = packed.input_ids.flatten()
    for first, size in zip(packed.first_tokens.tolist(), packed.lengths, strict=True):
        tokens = slice(first, first + size)
        torch.testing.assert_close(together[tokens], alone[tuple(ids[tokens].tolist())], atol=1e-5, rtol=1e-4)


# The order of a run


@given(
    lengths=st.lists(st.integers(1, 400), min_size=8, max_size=300),
    batch_size=st.sampled_from([1, 2, 8]),
    pool=st.integers(1, 9),
    block=st.sampled_from([1, 3, 16, 1000]),
    by_length=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_an_epoch_takes_every_sequence_at_most_once_in_full_batches(
    lengths: list[int], batch_size: int, pool: int, block: int, by_length: bool, seed: int
) -> None:
    def batches() -> Batches:
        return Batches(lengths, batch_size, seed=seed, pool=pool, block=block, by_length=by_length)

    made = batches()
    assert made.per_epoch == len(lengths) // batch_size
    steps = range(2 * made.per_epoch)
    run = [made(step) for step in steps]
    for epoch in (0, 1):
        taken = [index for step in steps if made.epoch(step) == epoch for index in run[step]]
        assert len(taken) == len(set(taken)) == made.per_epoch * batch_size
        assert set(taken) <= set(range(len(lengths)))
    assert all(len(batch) == batch_size for batch in run)
    if by_length:
        assert all(lengths[a] <= lengths[b] for batch in run for a, b in pairwise(batch))
    backwards = batches()
    assert [backwards(step) for step in reversed(steps)] == run[::-1]  # whatever came before


def test_two_epochs_and_two_seeds_have_different_orders() -> None:
    lengths = [10] * 64
    batches = Batches(lengths, 8, seed=1)
    first, second = ([batches(step) for step in range(8 * epoch, 8 * epoch + 8)] for epoch in (0, 1))
    assert first != second
    assert first != [Batches(lengths, 8, seed=2)(step) for step in range(8)]
    with pytest.raises(ValueError, match="7 sequences are fewer than one batch of 8"):
        Batches(lengths[:7], 8, seed=1)


def test_batches_hold_sequences_of_like_length() -> None:
    lengths = np.random.default_rng(0).integers(50, 380, 4096)
    batches = Batches(lengths, 32, seed=0)
    padded = sum(32 * lengths[batches(step)].max() for step in range(batches.per_epoch))
    assert padded / lengths.sum() < 1.06


def test_a_pool_reads_few_blocks() -> None:
    batches = Batches([10] * 100_000, 32, seed=0, pool=8, block=256)
    for pool in (0, 1, 57):
        read = {index // 256 for step in range(8 * pool, 8 * pool + 8) for index in batches(step)}
        assert len(read) <= 2  # 256 sequences, from the end of one block and the beginning of another
    everything = {index for step in range(batches.per_epoch) for index in batches(step)}
    assert len(everything) == 100_000


# Shard sets as batches


@pytest.fixture(scope="module")
def shard_set(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    directory = tmp_path_factory.mktemp("shards")
    chooser = np.random.default_rng(9)
    made = [random_pair(int(chooser.integers(6, 65)), chooser) for _ in range(100)]
    tokenizer = '{"model": {}}'
    (directory / "tokenizer.json").write_text(tokenizer)
    manifest = ShardManifest(
        storage="parquet",
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        max_seq_len=64,
        max_predictions_per_seq=6,
        short_seq_prob=0.1,
        duplicates=1,
        language="en",
        seed=1,
        shard_bytes=1,
        sources=(),
        shards=tuple(
            write_shard(directory / f"part-{number:05}.parquet", made[at : at + 40], "parquet", VOCABULARY)
            for number, at in enumerate(range(0, 100, 40))
        ),
    )
    manifest.write(directory / MANIFEST_FILE)
    return ShardSet.open(directory)


def test_a_run_masks_and_pads_by_the_special_tokens_of_its_set(shard_set: ShardSet) -> None:
    run = MaskedPairs(shard_set, batch_size=16, seed=3)
    shown: list[int] = []
    for step in range(100):
        batch = run.collate(run.items(step))
        padding = batch.attention_mask == 0
        assert set(batch.input_ids[padding].tolist()) <= {PAD}
        assert not (batch.input_ids[~padding] == PAD).any()
        kept = batch.input_ids.flatten()[batch.masked_positions]
        shown += kept[kept != batch.labels].tolist()
    assert shown.count(MASK) / len(shown) == pytest.approx(8 / 9, abs=0.02)
    assert set(shown) == {MASK, *REPLACEMENTS.tolist()}, "a token is replaced by [MASK] or by any that is not special"
    other = MaskedPairs(shard_set, batch_size=16, seed=4).collate(run.items(0))
    assert other.masked_positions.tolist() != run.collate(run.items(0)).masked_positions.tolist(), "by the run's seed"


@pytest.mark.parametrize("packed", [False, True])
def test_a_run_over_a_shard_set_is_a_function_of_the_step(shard_set: ShardSet, packed: bool) -> None:
    def run() -> MaskedPairs:
        return MaskedPairs(shard_set, batch_size=16, seed=3, packed=packed)

    assert run().per_epoch == 6
    items = run().items(7)
    assert {item.epoch for item in items} == {1}
    assert items == run().items(7)
    if not packed:
        assert [int(shard_set.lengths[item.row]) for item in items] == sorted(
            int(shard_set.lengths[item.row]) for item in items
        )
    batch = run().collate(items)
    assert sorted(batch.lengths) == sorted(int(shard_set.lengths[item.row]) for item in items)
    assert (len(batch.input_ids) < 16) == packed
    # However the batch is shared out, the same tokens are masked.
    shares = [run().collate(items[begin:end]) for begin, end in ((0, 5), (5, 11), (11, 16))]
    assert sorted(batch.labels.tolist()) == sorted(label for share in shares for label in share.labels.tolist())
    assert max(len(share.labels) for share in shares) <= 6 * 6


def test_a_set_smaller_than_a_batch_is_refused(shard_set: ShardSet) -> None:
    with pytest.raises(ValueError, match="100 sequences are fewer than one batch of 101"):
        MaskedPairs(shard_set, batch_size=101, seed=1)
