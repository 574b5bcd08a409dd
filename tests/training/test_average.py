"""Test averaging of checkpoints: the arithmetic, and the refusal of checkpoints of other models."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from bertqa.cli.command import parse
from tests.support.checkpoints import write_checkpoint
from tests.support.corruption import QUERY, change_json, cut, with_array, without
from training.average import main
from training.options import AverageArguments


def drawn(directory: Path, seed: int) -> Path:
    """A tiny checkpoint with weights of its own."""
    checkpoint, random = write_checkpoint(directory), np.random.default_rng(seed)
    weights = load_file(checkpoint / "model.safetensors")
    noisy = {name: random.normal(size=array.shape).astype(array.dtype) for name, array in weights.items()}
    save_file(noisy, checkpoint / "model.safetensors", metadata={"format": "pt"})
    return checkpoint


@given(shares=st.none() | st.lists(st.floats(0.01, 100), min_size=3, max_size=3))
def test_the_mean_is_that_of_every_weight(tmp_path_factory: pytest.TempPathFactory, shares: list[float] | None) -> None:
    root = tmp_path_factory.mktemp("soup")
    checkpoints = [drawn(root / str(seed), seed) for seed in range(3)]
    flags = ["--shares", ",".join(map(str, shares))] if shares else []
    main(parse(AverageArguments, [*map(str, checkpoints), *flags, "--output", str(root / "mean")]))
    read = [load_file(checkpoint / "model.safetensors") for checkpoint in checkpoints]
    averaged = load_file(root / "mean" / "model.safetensors")
    assert averaged.keys() == read[0].keys()
    for name, array in averaged.items():
        expected = np.average([each[name].astype(np.float64) for each in read], axis=0, weights=shares)
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, expected, rtol=0, atol=2e-6)
    tokenizers = [json.loads((path / "tokenizer.json").read_text()) for path in (checkpoints[0], root / "mean")]
    assert tokenizers[0] == tokenizers[1]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            without(QUERY),
            rf"model.safetensors: the shape of {QUERY} is None, in",
        ),
        (with_array(QUERY, np.zeros((3, 3))), r"is \(3, 3\), in .*a \(32, 32\)"),
        (change_json("config.json", num_attention_heads=2), "b: config.json: num_attention_heads is 2, in .*a 4"),
        (change_json("config.json", architectures=["BertModel"]), "b is a BertModel, .*a a BertForQuestionAnswering"),
        (change_json("config.json", architectures=[]), "b: config.json cannot be used"),
        (change_json("tokenizer.json", truncation={"max_length": 8}), "b: tokenizer.json differs from that of .*a"),
        (cut("config.json"), "b: config.json cannot be used"),
        (cut("tokenizer.json"), "b: tokenizer.json cannot be used"),
        (cut("model.safetensors"), "b: model.safetensors cannot be used"),
    ],
)
def test_what_is_not_of_one_model_is_refused_by_name(tmp_path: Path, spoil: Callable[[Path], None], said: str) -> None:
    checkpoints = [drawn(tmp_path / name, seed) for seed, name in enumerate("ab")]
    spoil(checkpoints[1])
    with pytest.raises(SystemExit, match=said):
        main(parse(AverageArguments, [*map(str, checkpoints), "--output", str(tmp_path / "mean")]))
    assert not (tmp_path / "mean").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["a"], "DIR: give at least two"),
        (["a", "b", "--shares", "1"], "--shares: 1 for 2 checkpoints"),
        (["a", "b", "--shares", "1,0"], "--shares: must be above 0, not 0.0"),
    ],
)
def test_a_wrong_command_line_is_refused(capsys: pytest.CaptureFixture[str], flags: list[str], said: str) -> None:
    with pytest.raises(SystemExit):
        parse(AverageArguments, [*flags, "--output", "mean"])
    assert said in capsys.readouterr().err
