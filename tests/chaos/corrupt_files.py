"""Corrupt the files of every reader; it must return correct content, or an error that names the file.

Each file is small and valid at first. Then it is truncated, bits are flipped, bytes are inserted and removed, and in
JSON whole values are replaced.
"""

import json
import logging
import secrets
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from bertqa.manifest import Bundle, BundleMismatch, Settings
from bertqa.repository import Repository
from bertqa.squad import MalformedSquad, read_squad
from engine_builder.architectures import read_architecture
from engine_builder.architectures.bert import Bert
from engine_builder.checkpoint import InvalidCheckpoint, read_weights
from tests.chaos.bad_input import INTEGERS, explore
from tests.chaos.report import Row, Size
from tests.support.checkpoints import write_checkpoint
from tests.support.repositories import publish_toy_bundle
from tests.support.texts import TEXTS
from tests.support.toy_model import toy_bundle
from training.checkpoints import STATE_FILE, CheckpointError, State, load_state, save_state
from training.shards import Pair, ShardError, ShardManifest, ShardSet, Source, tokenizer_sha256, write_shard

SHARE = 0.02
"""Share of all inputs for each file."""
RUN = {"learning_rate": 0.1}


@dataclass(frozen=True, slots=True)
class Reader:
    """A file, how to read it, and a check of what was read."""

    path: Path
    read: Callable[[], object]
    refusal: type[Exception]
    accepts: Callable[[Any], bool]  # checks the content of a changed file


def _squad(path: Path) -> None:
    answers = [{"text": "Ada", "answer_start": 0}, {"text": "서울", "answer_start": 10}]
    questions = [
        {"id": "1", "question": "Who?", "answers": answers[:1]},
        {"id": "2", "question": "Where?", "answers": answers[1:], "is_impossible": False},
        {"id": "3", "question": "When?", "answers": [], "is_impossible": True},
    ]
    article = {"title": "Ada", "paragraphs": [{"context": "Ada lived 서울 😀.", "qas": questions}]}
    path.write_text(json.dumps({"version": "v2.0", "data": [article]}, ensure_ascii=False))


def _shards(directory: Path, tokenizer: str) -> None:
    directory.mkdir()
    random = np.random.default_rng(0)
    pairs = [
        Pair(random.integers(4, 90, 20, dtype=np.int32), np.ones(20, bool), second=9, is_random_next=bool(n % 2))
        for n in range(30)
    ]
    shard = write_shard(directory / "part-00000.parquet", pairs, "parquet", 100)
    (directory / "tokenizer.json").write_text(tokenizer)
    ShardManifest(
        storage="parquet",
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        vocab_size=100,
        special_tokens={"[MASK]": 4},
        max_seq_len=20,
        max_predictions_per_seq=3,
        short_seq_prob=0.1,
        duplicates=1,
        language="en",
        seed=0,
        shard_bytes=1 << 20,
        sources=(Source("books/a.parquet", 3, "0" * 64),),
        shards=(shard,),
    ).write(directory / "manifest.json")


def readers(root: Path) -> Mapping[str, Reader]:
    """Write a valid file of each kind, with how to read it."""
    checkpoint = write_checkpoint(root / "checkpoint", hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    architecture = read_architecture(checkpoint)
    _squad(root / "squad.json")
    _shards(root / "shards", (checkpoint / "tokenizer.json").read_text())
    save_state(root, State(3, {"model/weight": torch.arange(6.0).reshape(2, 3)}, {"scale": 2.0}), RUN)
    bundle = toy_bundle()
    repository = Repository(root / "models")
    version = publish_toy_bundle(repository, bundle, 1)
    repository.activate("bert_qa", 1)
    hashed = (version / "tokenizer.json", root / "shards" / "part-00000.parquet", root / STATE_FILE)
    whole = {path.name: (path, path.read_bytes()) for path in hashed}

    def is_as_it_was(name: str) -> Callable[[object], bool]:
        path, data = whole[name]
        return lambda found: path.read_bytes() == data

    def weights_are_whole(found: Mapping[str, Any]) -> bool:
        shapes = {name: array.shape for name, array in found.items()}
        return shapes == architecture.shapes() and all(np.isfinite(array).all() for array in found.values())

    def is_what_json_says(found: Bert) -> bool:
        said = json.loads((checkpoint / "config.json").read_bytes())
        encoder = found.encoder
        numbers = {
            "vocab_size": found.vocab_size,
            "max_position_embeddings": found.max_tokens,
            "type_vocab_size": found.token_types,
            "num_hidden_layers": encoder.layers,
            "hidden_size": encoder.hidden_size,
            "num_attention_heads": encoder.heads,
            "intermediate_size": encoder.intermediate_size,
        }
        return bool(said.get("layer_norm_eps", 1e-12) == encoder.layer_norm_eps and numbers.items() <= said.items())

    def answers_are_in_place(found: Any) -> bool:
        ids = [example.id for example in found]
        return len(set(ids)) == len(ids) and all(
            reference.text and example.context.startswith(reference.text, reference.start)
            for example in found
            for reference in example.references
        )

    def is_written_again(path: Path) -> Callable[[Any], bool]:
        def holds(found: Any) -> bool:
            found.write(root / "again.json")
            said, again = json.loads(path.read_bytes()), json.loads((root / "again.json").read_bytes())
            return all(again[name] == value for name, value in said.items())

        return holds

    return {
        "config.json": Reader(
            checkpoint / "config.json",
            lambda: read_architecture(checkpoint),
            InvalidCheckpoint,
            is_what_json_says,
        ),
        "model.safetensors": Reader(
            checkpoint / "model.safetensors",
            lambda: read_weights(checkpoint, architecture),
            InvalidCheckpoint,
            weights_are_whole,
        ),
        "bertqa.json": Reader(
            checkpoint / "bertqa.json",
            lambda: Settings.of_checkpoint(checkpoint),
            BundleMismatch,
            is_written_again(checkpoint / "bertqa.json"),
        ),
        "squad.json": Reader(
            root / "squad.json", lambda: read_squad(root / "squad.json"), MalformedSquad, answers_are_in_place
        ),
        "manifest.json": Reader(
            version / "manifest.json",
            lambda: Bundle.open(version).manifest,
            BundleMismatch,
            is_written_again(version / "manifest.json"),
        ),
        "tokenizer.json": Reader(
            version / "tokenizer.json", lambda: Bundle.open(version), BundleMismatch, is_as_it_was("tokenizer.json")
        ),
        "serving.json": Reader(
            root / "models" / "serving.json",
            repository.serving,
            BundleMismatch,
            lambda found: all(each.active in each.loaded for each in found.values()),
        ),
        "shards/manifest.json": Reader(
            root / "shards" / "manifest.json",
            lambda: ShardManifest.read(root / "shards" / "manifest.json"),
            ShardError,
            is_written_again(root / "shards" / "manifest.json"),
        ),
        "shards/part-00000.parquet": Reader(
            root / "shards" / "part-00000.parquet",
            lambda: ShardSet.open(root / "shards")[29],
            ShardError,
            is_as_it_was("part-00000.parquet"),
        ),
        STATE_FILE: Reader(
            root / STATE_FILE,
            lambda: load_state(root, RUN),
            CheckpointError,
            is_as_it_was(STATE_FILE),
        ),
    }


VALUES: st.SearchStrategy[Any] = (
    st.none() | st.booleans() | INTEGERS | st.floats() | TEXTS | st.just([]) | st.just({}) | st.just("\ud800")
)


@st.composite
def spoiled(draw: st.DrawFn, whole: bytes, *, is_json: bool) -> bytes:
    """Damage the file in one or two places."""
    data = whole
    for _ in range(draw(st.integers(1, 2))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        match draw(st.integers(0, 5 if is_json else 3)):
            case 0:
                data = data[:place]
            case 1:
                flipped = bytes(byte ^ 1 << draw(st.integers(0, 7)) for byte in data[place : place + 1])
                data = data[:place] + flipped + data[place + 1 :]
            case 2:
                data = data[:place] + draw(st.binary(max_size=9)) + data[place + draw(st.integers(0, 9)) :]
            case 3:
                data = data[:place] + b"[" * draw(st.sampled_from((1, 5_000))) + data[place:]
            case _:
                data = json.dumps(_replaced(draw, json.loads(whole))).encode()
    return data


def _replaced(draw: st.DrawFn, value: Any) -> Any:
    """Replace, remove or duplicate one value inside a JSON value."""
    if isinstance(value, dict | list) and value and draw(st.integers(0, 4)):
        copy = value.copy()
        key = draw(st.sampled_from(list(copy) if isinstance(copy, dict) else range(len(copy))))
        match draw(st.integers(0, 5)):
            case 0:
                del copy[key]
            case 1 if isinstance(copy, list):
                copy.append(copy[key])
            case 1 if isinstance(copy, dict):
                copy[draw(TEXTS)] = copy[key]
            case _:
                copy[key] = _replaced(draw, copy[key])
        return copy
    return draw(VALUES)


def read_spoiled(row: Row, reader: Reader, data: bytes) -> None:
    """Read a changed file."""
    row.requests += 1
    row.injected += 1
    reader.path.write_bytes(data)
    try:
        found = reader.read()
    except reader.refusal as error:
        row.refused[reader.refusal.__name__] += 1
        said = str(error)
        assert str(reader.path) in said or str(reader.path.parent) in said, said
        assert len(said) < 2_000, said[:3_000]
        return
    row.right += 1
    if not reader.accepts(found):
        row.wrong += 1
        raise AssertionError(f"{reader.path.name} was accepted as {found!r:.500}")


def damage(name: str, count: int, seed: int) -> Row:
    """Read ``count`` damaged files of a kind."""
    row = Row(fault=f"corrupt {name}")
    with tempfile.TemporaryDirectory() as directory:
        reader = readers(Path(directory))[name]
        whole = reader.path.read_bytes()
        reader.read()
        inputs = spoiled(whole, is_json=name.endswith(".json"))
        return explore(row, inputs, lambda data: read_spoiled(row, reader, data), count, seed)


NAMES = (
    *("config.json", "model.safetensors", "bertqa.json", "squad.json", "manifest.json", "tokenizer.json"),
    *("serving.json", "shards/manifest.json", "shards/part-00000.parquet", STATE_FILE),
)


def corrupt_files(size: Size) -> Iterator[Row]:
    """Return a row for each kind of file."""
    logging.getLogger("bertqa").setLevel(logging.ERROR)  # avoids thousands of warnings
    seed = secrets.randbelow(1 << 31)
    print(f"corrupt files: seed {seed}", file=sys.stderr)
    for name in NAMES:
        yield damage(name, max(int(SHARE * size.inputs), 5), seed)
