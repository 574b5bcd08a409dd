"""Test that corrupt checkpoints, data and states are refused with file and place named, and no pickle is loaded."""

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import BertForQuestionAnswering

from bertqa.manifest import BundleMismatch, Settings
from bertqa.squad import MalformedSquad, read_squad
from engine_builder.architectures import read_architecture
from engine_builder.checkpoint import InvalidCheckpoint, read_weights
from tests.chaos.corrupt_files import NAMES, damage
from tests.chaos.report import table
from tests.support.checkpoints import write_checkpoint
from tests.support.corruption import QUERY, change_json, cut, with_array, without
from tests.support.paths import ROOT
from tests.support.squad_files import write_squad
from training.encoders import EncoderOptions, load_model, load_tokenizer


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_file_is_named_or_read_right(name: str) -> None:
    row = damage(name, 200, 0)
    print(table([row]))
    assert row.is_kept, row.problems
    assert row.refused.total() + row.right == row.requests == 200


class Mark:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("job", ["engine_builder", "training.finetune_squad"])
def test_a_pickle_is_refused_and_never_run(tmp_path: Path, name: str, job: str) -> None:
    checkpoint, mark = write_checkpoint(tmp_path / "checkpoint"), tmp_path / "mark"
    squad = write_squad(checkpoint / "gate.json")
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / name).write_bytes(pickle.dumps(Mark(mark)))
    flags = {
        "engine_builder": [
            "--checkpoint",
            checkpoint,
            "--target",
            "cpu",
            "--precision",
            "fp32",
            "--repository",
            tmp_path,
        ],
        "training.finetune_squad": ["--init", checkpoint, "--train", squad, "--output", tmp_path / "out"],
    }[job]
    done = subprocess.run(
        [sys.executable, "-m", job, *map(str, flags)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode != 0
    assert not mark.exists()
    assert "Traceback" not in done.stderr
    assert str(checkpoint) in done.stderr
    pickle.loads((checkpoint / name).read_bytes()).close()
    assert mark.exists(), "whoever unpickles it is seen"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (cut("model.safetensors"), "model.safetensors"),
        (cut("config.json"), "config.json"),
        (without(QUERY), f"model.safetensors has no tensor {QUERY}"),
        (with_array(QUERY, np.zeros((3, 3), np.float32)), "cannot be used"),
        (with_array(QUERY, np.full((32, 32), np.nan, np.float32)), f"tensor {QUERY} contains NaN"),
        (change_json("config.json", num_hidden_layers=3), "has no tensor bert.encoder.layer.2"),
    ],
)
def test_a_job_refuses_an_encoder_that_is_corrupt(tmp_path: Path, spoil: Callable[[Path], None], said: str) -> None:
    checkpoint, options = write_checkpoint(tmp_path), EncoderOptions(0.1, 0.1, "eager")
    without("qa_outputs.bias")(checkpoint)  # a head may be new
    load_model(BertForQuestionAnswering, str(checkpoint), options)
    spoil(checkpoint)
    with pytest.raises(SystemExit) as caught:
        load_model(BertForQuestionAnswering, str(checkpoint), options)
    assert str(checkpoint) in str(caught.value)
    assert said in str(caught.value)


def test_a_job_refuses_a_tokenizer_that_is_corrupt(tmp_path: Path) -> None:
    cut("tokenizer.json")(write_checkpoint(tmp_path))
    with pytest.raises(SystemExit, match=r"tokenizer\.json cannot be used"):
        load_tokenizer(str(tmp_path))


def test_weights_of_whole_numbers_are_refused(tmp_path: Path) -> None:
    with_array("qa_outputs.bias", np.zeros(2, np.int64))(write_checkpoint(tmp_path))
    with pytest.raises(InvalidCheckpoint, match=r"model\.safetensors: tensor qa_outputs\.bias has type I64"):
        read_weights(tmp_path, read_architecture(tmp_path))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"max_seq_len": "64"}, "max_seq_len must be int, not '64'"),
        ({"overlap": True}, "overlap must be int, not True"),
        ({"null_threshold": float("nan")}, "null_threshold must be float, not nan"),
        ({"name": "\ud800"}, "surrogates not allowed"),
    ],
)
def test_settings_of_other_types_are_refused(tmp_path: Path, fields: dict[str, object], said: str) -> None:
    (tmp_path / "bertqa.json").write_text(json.dumps(fields))
    with pytest.raises(BundleMismatch, match=rf"bertqa\.json: .*{said}"):
        Settings.of_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"id": "0"}, r"qas\[1\]\.id: '0' is already used at data\[0\]\.paragraphs\[0\]\.qas\[0\]"),
        ({"question": " \u200b"}, r"question: must contain visible text"),
        ({"question": "\ud800"}, r"question: not valid Unicode, lone surrogate at character 0"),
        ({"answers": [{"text": "", "answer_start": 0}]}, r"answers\[0\]: the context does not contain ''"),
        ({"answers": [{"text": "Ada", "answer_start": 10**30}]}, r"answers\[0\]: the context does not contain 'Ada'"),
    ],
)
def test_questions_that_cannot_be_asked_are_refused(tmp_path: Path, change: dict[str, object], said: str) -> None:
    path = write_squad(tmp_path / "squad.json")
    document = json.loads(path.read_text())
    questions = document["data"][0]["paragraphs"][0]["qas"]
    questions[1].update(change)
    path.write_text(json.dumps(document))
    with pytest.raises(MalformedSquad, match=said):
        read_squad(path)
