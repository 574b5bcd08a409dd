"""Test documents, pairs and shard sets: the bytes do not depend on the processes, and all damage is detected."""

import contextlib
import hashlib
import io
import json
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from bertqa.cli.command import parse, status
from tests.support.paths import ROOT
from training import shards as shards_module
from training.data import documents as documents_module
from training.data.commands import ShardOptions, app
from training.data.documents import DataError, Document, document_groups, write_documents
from training.data.pairs import PairMaker, Sentence
from training.data.sharding import PARTIAL_FILE, train_tokenizer, write_shard_set
from training.shards import MANIFEST_FILE, Pair, ShardError, ShardMismatch, ShardSet, Storage, write_shard
from training.tfrecords import CorruptRecord, read_examples, write_examples

WORDS = ("the", "forest", "river", "king", "mountain", "old", "seldom", "walks", "sings", "under", "bright", "stone")
CLS, SEP = 1, 2


def documents_of_words(count: int) -> list[Document]:
    chooser = random.Random(5)

    def sentence() -> str:
        return " ".join(chooser.choices(WORDS, k=chooser.randint(3, 14))).capitalize() + "."

    return [
        Document(str(n), "", [" ".join(sentence() for _ in range(chooser.randint(1, 6))) for _ in range(4)])
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with documents in small row groups, and a tokenizer beside it."""
    folder = tmp_path_factory.mktemp("corpus")
    documents = documents_of_words(120)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents_module, "GROUP_BYTES", 3000)
        for name, part in (("one", documents[:70]), ("two", documents[70:])):
            (folder / name).mkdir()
            write_documents(folder / name / "text-00000.parquet", part)
    train_tokenizer([folder / "one"], folder / "tokenizer.json", vocab_size=60, lowercase=True)
    return folder


def make(corpus: Path, output: Path, *, processes: int = 1, seed: int = 1, storage: Storage = "parquet") -> ShardSet:
    write_shard_set(
        [corpus / "one", corpus / "two"],
        corpus / "tokenizer.json",
        output,
        storage=storage,
        max_seq_len=48,
        max_predictions_per_seq=7,
        seed=seed,
        shard_bytes=12_000,
        processes=processes,
    )
    return ShardSet.open(output)


@pytest.fixture(scope="module")
def shard_set(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return make(corpus, tmp_path_factory.mktemp("shards"))


def files_of(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def rows_of(shards: ShardSet) -> list[tuple[list[int], list[bool], int, bool]]:
    return [
        (pair.input_ids.tolist(), pair.word_starts.tolist(), pair.second, pair.is_random_next)
        for pair in (shards[row] for row in range(len(shards)))
    ]


# Pairs


def numbered(sizes: list[list[int]]) -> list[list[Sentence]]:
    """Documents of sentences of these sizes, in which each token is another one: 1000 * document + place + 10."""
    documents = []
    for number, document in enumerate(sizes):
        bounds = np.cumsum([0, *document])
        tokens = 1000 * number + 10 + np.arange(bounds[-1], dtype=np.int32)
        documents.append([Sentence(tokens[begin:end], tokens[begin:end] % 3 != 0) for begin, end in pairwise(bounds)])
    return documents


def pairs_of(documents: list[list[Sentence]], *, max_seq_len: int, seed: int, short: float = 0.1) -> list[list[Pair]]:
    maker = PairMaker(cls_id=CLS, sep_id=SEP, max_seq_len=max_seq_len, short_seq_prob=short, random=random.Random(seed))
    return [list(maker(documents, number)) for number in range(len(documents))]


def segments(pair: Pair) -> tuple[list[int], list[int]]:
    ids = pair.input_ids.tolist()
    assert (ids[0], ids[pair.second - 1], ids[-1]) == (CLS, SEP, SEP)
    return ids[1 : pair.second - 1], ids[pair.second : -1]


@given(
    sizes=st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=12), min_size=2, max_size=6),
    max_seq_len=st.integers(8, 64),
    seed=st.integers(0, 1000),
)
def test_a_pair_is_two_passages_that_follow_each_other_or_are_of_two_documents(
    sizes: list[list[int]], max_seq_len: int, seed: int
) -> None:
    documents = numbered(sizes)
    for number, pairs in enumerate(pairs_of(documents, max_seq_len=max_seq_len, seed=seed)):
        seen: list[int] = []
        for pair in pairs:
            first, second = segments(pair)
            assert len(pair.input_ids) == len(pair.word_starts) <= max_seq_len
            for segment in (first, second):
                assert segment == list(range(segment[0], segment[0] + len(segment)))
            assert first[0] // 1000 == number
            assert (second[0] // 1000 != number) == pair.is_random_next
            assert pair.word_starts[[0, 1, pair.second - 1, pair.second, -1]].all()
            for place, token in enumerate(pair.input_ids.tolist()):
                if token >= 10 and token % 3:
                    assert pair.word_starts[place]
            seen += first if pair.is_random_next else first + second
        assert seen == sorted(set(seen))  # in order, and nothing twice


@given(
    sizes=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=12), min_size=2, max_size=4),
    seed=st.integers(0, 1000),
)
def test_no_sentence_is_left_out(sizes: list[list[int]], seed: int) -> None:
    documents = numbered(sizes)
    total = max(sum(document) for document in sizes)
    for number, pairs in enumerate(pairs_of(documents, max_seq_len=3 + 2 * total, seed=seed, short=0.0)):
        seen = [
            token
            for pair in pairs
            for segment in (segments(pair)[:1] if pair.is_random_next else segments(pair))
            for token in segment
        ]
        assert seen == [token for sentence in documents[number] for token in sentence.ids.tolist()]


def test_a_sentence_longer_than_a_pair_becomes_several() -> None:
    documents = numbered([[100], [5]])
    pairs = pairs_of(documents, max_seq_len=23, seed=3, short=0.0)[0]
    firsts = {token for pair in pairs for token in segments(pair)[0] + segments(pair)[1] * (not pair.is_random_next)}
    assert len(pairs) >= 3
    assert len(firsts) > 50


def test_half_of_the_pairs_are_random_and_most_are_full(shard_set: ShardSet) -> None:
    random_share = np.mean([pair.is_random_next for pair in map(shard_set.__getitem__, range(len(shard_set)))])
    assert 0.45 < random_share < 0.65  # the last pair of a document often has no sentence left that could follow
    assert np.mean(shard_set.lengths == 48) > 0.4
    assert shard_set.lengths.min() < 24


# Sets


def test_a_set_holds_the_text_and_says_what_it_was_made_with(shard_set: ShardSet, corpus: Path) -> None:
    manifest = shard_set.manifest
    tokenizer = Tokenizer.from_file(str(shard_set.directory / "tokenizer.json"))
    assert manifest.special_tokens == {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
    assert manifest.vocab_size == tokenizer.get_vocab_size()
    assert (manifest.max_seq_len, manifest.max_predictions_per_seq, manifest.rows) == (48, 7, len(shard_set))
    assert [(source.file, source.documents) for source in manifest.sources] == [
        ("one/text-00000.parquet", 70),
        ("two/text-00000.parquet", 50),
    ]
    assert len(manifest.shards) > 3
    texts = " ".join(" ".join(document.paragraphs) for document in documents_of_words(120)).lower()
    for row in range(0, len(shard_set), 17):
        pair = shard_set[row]
        first = tokenizer.decode(pair.input_ids[1 : pair.second - 1].tolist()).replace(" .", ".")
        words = first.split()
        whole = words[1:] if not texts.count(f" {words[0]} ") else words  # its first word may be the rest of one
        assert " ".join(whole) in texts
        assert pair.word_starts.sum() <= len(pair.input_ids)
    assert any(not shard_set[row].word_starts.all() for row in range(len(shard_set)))  # some words are pieces


def test_the_number_of_processes_changes_no_byte(shard_set: ShardSet, corpus: Path, tmp_path: Path) -> None:
    make(corpus, tmp_path / "two", processes=2)
    assert files_of(tmp_path / "two") == files_of(shard_set.directory)
    other = make(corpus, tmp_path / "other", seed=2)
    assert {shard.sha256 for shard in other.manifest.shards}.isdisjoint(
        shard.sha256 for shard in shard_set.manifest.shards
    )


def test_a_killed_run_goes_on_to_the_same_bytes(shard_set: ShardSet, corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "shards"
    code = (
        "from pathlib import Path; from training.data.sharding import write_shard_set; "
        f"corpus = Path({str(corpus)!r}); write_shard_set([corpus / 'one', corpus / 'two'], corpus / 'tokenizer.json', "
        f"Path({str(output)!r}), max_seq_len=48, max_predictions_per_seq=7, shard_bytes=12_000, processes=2)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    while not finished(output):
        assert process.poll() is None
        time.sleep(0.001)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    assert psutil.wait_procs(children, timeout=60)[1] == []  # nobody goes on without it
    with pytest.raises(ShardError, match=rf"no complete shard set, {MANIFEST_FILE} is missing"):
        ShardSet.open(output)
    kept = {name: (output / name).stat().st_mtime_ns for name in finished(output)}
    assert 0 < len(kept) < len(shard_set.manifest.shards)
    make(corpus, output)
    for leftover in output.glob(".*.partial"):
        leftover.unlink()
    assert files_of(output) == files_of(shard_set.directory)
    assert kept == {name: (output / name).stat().st_mtime_ns for name in kept}


def finished(output: Path) -> list[str]:
    """The shards that a run has finished so far."""
    partial = output / PARTIAL_FILE
    return [shard["file"] for shard in json.loads(partial.read_bytes())["shards"]] if partial.exists() else []


def damaged(shard_set: ShardSet, directory: Path) -> Path:
    """A copy of the set that a test may damage; returns one of its shards."""
    directory.mkdir()
    for path in shard_set.directory.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    return directory / shard_set.manifest.shards[2].file


def test_a_damaged_shard_is_named_and_refused(shard_set: ShardSet, tmp_path: Path) -> None:
    path = damaged(shard_set, tmp_path / "set")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ShardError, match=r"part-00002\.parquet: truncated, \d+ bytes where manifest\.json has \d+"):
        ShardSet.open(tmp_path / "set", hashed=False)
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(ShardError, match=r"part-00002\.parquet: corrupt, SHA-256"):
        ShardSet.open(tmp_path / "set")
    path.unlink()
    with pytest.raises(ShardError, match=r"part-00002\.parquet: is missing"):
        ShardSet.open(tmp_path / "set")


def test_a_shard_that_is_damaged_later_is_named_when_it_is_read(shard_set: ShardSet, tmp_path: Path) -> None:
    path = damaged(shard_set, tmp_path / "set")
    opened = ShardSet.open(tmp_path / "set")
    first = sum(shard.rows for shard in shard_set.manifest.shards[:2])
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ShardError, match=r"part-00002\.parquet: cannot be read"):
        opened[first]
    assert opened[first - 1].second == shard_set[first - 1].second
    with pytest.raises(IndexError, match=f"row {len(opened)} of {len(opened)}"):
        opened[len(opened)]


def test_a_damaged_shard_is_made_anew_and_the_others_are_kept(
    shard_set: ShardSet, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = damaged(shard_set, tmp_path / "set")
    times = {other: other.stat().st_mtime_ns for other in (tmp_path / "set").glob("part-*") if other != path}
    path.write_bytes(b"nothing")
    make(corpus, tmp_path / "set")
    assert files_of(tmp_path / "set") == files_of(shard_set.directory)
    assert times == {other: other.stat().st_mtime_ns for other in times}
    assert "made anew" in capsys.readouterr().out


def test_a_manifest_or_tokenizer_that_does_not_fit_is_named(shard_set: ShardSet, tmp_path: Path) -> None:
    directory = damaged(shard_set, tmp_path / "set").parent
    tokenizer = directory / "tokenizer.json"
    text = tokenizer.read_text()
    tokenizer.write_text(text.replace('"lowercase": true', '"lowercase": false'))
    with pytest.raises(ShardError, match=r"tokenizer\.json: not the tokenizer that the shards were made with"):
        ShardSet.open(directory)
    tokenizer.write_text("{}")
    with pytest.raises(ShardError, match=r"tokenizer\.json: not the tokenizer"):
        ShardSet.open(directory)
    tokenizer.write_text("[]")
    with pytest.raises(ShardError, match=r"tokenizer\.json: not a readable tokenizer"):
        ShardSet.open(directory)
    # What is only laid out differently, and how it pads, does not matter.
    tokenizer.write_text(json.dumps(json.loads(text) | {"truncation": {"max_length": 9}}, indent=3))
    ShardSet.open(directory)
    manifest = directory / MANIFEST_FILE
    values = json.loads(manifest.read_bytes())
    for broken, problem in (
        ("{", "not readable"),
        ("[]", "must be a JSON object"),
        ("{}", "format None, this release reads 1"),
        (json.dumps(values | {"sources": {}}), "sources must be a list"),
        (json.dumps(values | {"seed": "1"}), "seed must be int, not '1'"),
        (json.dumps(values | {"shards": [values["shards"][0] | {"rows": 1.5}]}), r"shards\[0\]: rows must be int"),
        (json.dumps(values | {"format": 99}), "format 99, this release reads 1"),
        (json.dumps(values | {"colour": "red"}), "colour"),
        (json.dumps({name: value for name, value in values.items() if name != "seed"}), "seed"),
        (json.dumps(values | {"shards": []}), "lists no shard"),
    ):
        manifest.write_text(broken)
        with pytest.raises(ShardError, match=rf"manifest\.json: .*{problem}"):
            ShardSet.open(directory)


def test_other_settings_do_not_mix_in_one_directory(shard_set: ShardSet, corpus: Path) -> None:
    with pytest.raises(DataError, match="holds shards made with another seed, 1 and not 2; give another --output"):
        make(corpus, shard_set.directory, seed=2)
    with pytest.raises(DataError, match="holds shards made with another sources; give another --output"):
        write_shard_set(
            [corpus / "one"],
            corpus / "tokenizer.json",
            shard_set.directory,
            max_seq_len=48,
            max_predictions_per_seq=7,
            shard_bytes=12_000,
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": -1}, r"a vocabulary of {vocabulary} tokens, the model's vocab_size is {less}"),
        ({"vocab_size": 1000}, r"a vocabulary of {vocabulary} tokens, the model's vocab_size is \d+"),
        ({"max_position_embeddings": 40}, "--max-seq-len 48, the model's max_position_embeddings is 40"),
        ({"type_vocab_size": 1}, "two segments, the model's type_vocab_size is 1"),
        ({"max_seq_len": 128}, "--max-seq-len 48, this run has --max-seq-len 128"),
        ({"max_predictions_per_seq": 20}, "--max-predictions-per-seq 7, this run has --max-predictions-per-seq 20"),
    ],
)
def test_a_model_that_the_set_was_not_made_for_is_refused(
    shard_set: ShardSet, change: dict[str, int], message: str
) -> None:
    vocabulary = shard_set.manifest.vocab_size
    fitting: dict[str, Any] = {"vocab_size": vocabulary, "max_position_embeddings": 512}
    shard_set.check_model(**fitting)
    shard_set.check_model(**fitting | {"vocab_size": -(-vocabulary // 8) * 8})
    if "vocab_size" in change:
        change = {"vocab_size": vocabulary + change["vocab_size"]}
    with pytest.raises(ShardMismatch, match=message.format(vocabulary=vocabulary, less=vocabulary - 1)):
        shard_set.check_model(**fitting | change)


def test_a_model_with_another_tokenizer_is_refused(shard_set: ShardSet) -> None:
    text = (shard_set.directory / "tokenizer.json").read_text()
    fitting = {"vocab_size": shard_set.manifest.vocab_size, "max_position_embeddings": 512}
    shard_set.check_model(**fitting, tokenizer=text)
    with pytest.raises(
        ShardMismatch, match=r"the tokenizer [0-9a-f]{12}…, the model's tokenizer\.json is [0-9a-f]{12}…"
    ):
        shard_set.check_model(**fitting, tokenizer=text.replace('"lowercase": true', '"lowercase": false'))


def test_rows_are_found_across_row_groups_and_shards(
    corpus: Path, shard_set: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = rows_of(shard_set)
    monkeypatch.setattr(shards_module, "GROUP_ROWS", 7)
    small = make(corpus, tmp_path / "small")
    assert rows_of(small) == expected
    order = random.Random(1).sample(range(len(small)), 50)
    assert [small[row].input_ids.tolist() for row in order] == [expected[row][0] for row in order]
    assert small.lengths.tolist() == [len(ids) for ids, _, _, _ in expected]


def test_token_ids_beyond_16_bits_are_kept(tmp_path: Path) -> None:
    pair = Pair(np.array([101, 70_000, 102, 119_546, 102], dtype=np.int32), np.ones(5, dtype=bool), 3, False)
    write_shard(tmp_path / "part.parquet", [pair], "parquet", 119_547)
    table = pq.read_table(tmp_path / "part.parquet")
    assert table["input_ids"].to_pylist() == [pair.input_ids.tolist()]


# TFRecord


def test_tfrecord_shards_hold_the_same_rows(shard_set: ShardSet, corpus: Path, tmp_path: Path) -> None:
    records = make(corpus, tmp_path / "records", storage="tfrecord")
    assert rows_of(records) == rows_of(shard_set)
    assert {shard.file.rpartition(".")[2] for shard in records.manifest.shards} == {"tfrecord"}
    path = tmp_path / "records" / records.manifest.shards[0].file
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ShardError, match=r"part-00000\.tfrecord: truncated"):
        ShardSet.open(tmp_path / "records")


def crc32c(data: bytes) -> int:
    """CRC-32C by its definition (RFC 3720, appendix B.4), bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def test_records_are_framed_and_encoded_as_tensorflow_has_it(tmp_path: Path) -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the check value that is published with the polynomial
    path = tmp_path / "x.tfrecord"
    write_examples(path, [{"a": [1, 300], "b": []}])
    # Example.features (1) > Features.feature entry (1) > key (1), value (2) > Feature.int64_list (3) > packed value (1)
    feature_a = b"\x0a\x0c" + b"\x0a\x01a" + b"\x12\x07" + b"\x1a\x05" + b"\x0a\x03" + b"\x01\xac\x02"
    feature_b = b"\x0a\x07" + b"\x0a\x01b" + b"\x12\x02" + b"\x1a\x00"
    message = b"\x0a" + bytes([len(feature_a) + len(feature_b)]) + feature_a + feature_b
    length = struct.pack("<Q", len(message))
    assert path.read_bytes() == length + masked(length) + message + masked(message)
    assert list(read_examples(path)) == [{"a": [1, 300], "b": []}]


@settings(max_examples=40)
@given(
    examples=st.lists(
        st.dictionaries(st.text(min_size=1, max_size=5), st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5)),
        min_size=1,
        max_size=4,
    ),
    data=st.data(),
)
def test_records_come_back_and_no_damage_goes_unseen(examples: list[dict[str, list[int]]], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.tfrecord"
        write_examples(path, examples)
        assert list(read_examples(path)) == examples
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(damaged)
        with pytest.raises(CorruptRecord, match=r"x\.tfrecord: record \d"):
            list(read_examples(path))
        path.write_bytes(whole[: -data.draw(st.integers(1, min(15, len(whole) - 1)))])
        with pytest.raises(CorruptRecord, match=r"x\.tfrecord: record \d"):
            list(read_examples(path))


def test_a_record_that_is_no_example_is_named(tmp_path: Path) -> None:
    length = struct.pack("<Q", 2)
    (tmp_path / "x").write_bytes(length + masked(length) + b"\xff\xff" + masked(b"\xff\xff"))
    with pytest.raises(CorruptRecord, match=r"record 0 is not a tf\.Example"):
        list(read_examples(tmp_path / "x"))


# The commands


def test_own_text_becomes_a_shard_set(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for document in documents_of_words(12):
        (folder / f"{document.id}.txt").write_text("\n\n".join(document.paragraphs) + "\n\n[SEP] is but text here.")
    run(["text", str(folder), "--output", str(tmp_path / "documents")])
    common = ["--documents", str(tmp_path / "documents")]
    run(["tokenizer", *common, "--output", str(tmp_path / "tokenizer.json"), "--vocab-size", "100"])
    flags = ["--tokenizer", str(tmp_path), "--max-seq-len", "32", "--max-predictions-per-seq", "5", "--processes", "1"]
    run(["shard", *common, *flags, "--output", str(tmp_path / "shards")])
    shards = ShardSet.open(tmp_path / "shards")
    sep = shards.manifest.special_tokens["[SEP]"]
    assert len(shards) > 12
    assert all((shards[row].input_ids == sep).sum() == 2 for row in range(len(shards)))


def run(command: list[str]) -> None:
    """`bertqa train data`, in this process; raises what it says where it fails."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = status(app, command)
    if code:
        raise SystemExit(said.getvalue())


def test_what_cannot_be_sharded_is_named(corpus: Path, tmp_path: Path) -> None:
    flags = ["--tokenizer", str(corpus / "tokenizer.json"), "--output", str(tmp_path / "out")]
    for documents, problem in (
        ([str(tmp_path / "nothing")], "nothing: holds no documents"),
        ([str(corpus / "one"), str(corpus / "one")], "one: is given twice"),
    ):
        with pytest.raises(SystemExit, match=rf"bertqa: error: .*{problem}"):
            run(["shard", *(f"--documents={each}" for each in documents), *flags])
    write_documents(tmp_path / "single.parquet", documents_of_words(1))
    with pytest.raises(SystemExit, match="at least two documents are needed"):
        run(["shard", "--documents", str(tmp_path), *flags])
    (tmp_path / "single.parquet").write_bytes(b"PAR1")
    with pytest.raises(SystemExit, match=r"single\.parquet: not readable"):
        run(["shard", "--documents", str(tmp_path), *flags])
    bad = tmp_path / "bad.json"
    for text, problem in (("{}", "not a readable tokenizer"), (without_mask(corpus), r"has no \[MASK\] token")):
        bad.write_text(text)
        with pytest.raises(SystemExit, match=rf"--tokenizer .*bad\.json: {problem}"):
            run(["shard", "--documents", str(corpus / "one"), *flags, "--tokenizer", str(bad)])


def without_mask(corpus: Path) -> str:
    return (corpus / "tokenizer.json").read_text().replace("[MASK]", "[NONE]")


@pytest.mark.parametrize(
    "flags",
    [
        ["--max-seq-len", "7"],
        ["--max-predictions-per-seq", "128"],
        ["--short-seq-prob", "1.5"],
        ["--duplicates", "0"],
        ["--storage", "csv"],
    ],
)
def test_flags_out_of_range_are_refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(ShardOptions, ["--documents", "d", "--tokenizer", "t", "--output", "o", *flags])
    assert flags[0] in capsys.readouterr().err


def test_all_documents_of_a_corpus_are_in_its_groups(corpus: Path) -> None:
    groups = document_groups(corpus / "one" / "text-00000.parquet")
    assert sum(group.documents for group in groups) == 70
    assert len(groups) > 5
