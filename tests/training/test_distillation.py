"""Test a teacher's soft labels: written by real processes, refused if they do not fit, and learned by a student."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import BertForQuestionAnswering

from bertqa.cli.command import parse
from bertqa.spans import Logits
from bertqa.squad import as_squad
from bertqa.windows import Window, WindowTokenizer
from tests.support.glue_files import write_task
from tests.support.lives import FLAGS, TOKENIZER, finetune, lives, train_teacher, under_horovod, write_encoder
from training import finetune_glue, finetune_squad, teach
from training.distillation import TEACHER_FILE, divergence
from training.inference import batches_by_length, predict
from training.options import GlueArguments, SquadArguments, TeachGlueArguments, TeachSquadArguments
from training.squad_data import SquadData
from training.squad_evaluation import predictor
from training.squad_features import UNLABELLED, collate, hold_back_articles, make_features, unlabelled, without_label

WINDOWS = ["--held-back-articles", "1", "--max-seq-len", "64", "--max-question-tokens", "16", "--overlap", "8"]
STUDENT = ["--dropout", "0", "--soft-share", "1", "--epochs", "12", "--learning-rate", "5e-3"]


def flags_of_teacher(data: Path, teacher: Path, output: Path, *more: str) -> list[str]:
    files = ("--train", str(data), "--init", str(teacher), "--output", str(output))
    return [*WINDOWS, *files, "--precision", "fp32", "--features-per-file", "16", *more]


def logits_in(directory: Path) -> torch.Tensor:
    return torch.cat([load_file(path)["logits"] for path in sorted(directory.glob("*.safetensors"))])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("squad") / "train.json"
    path.write_text(json.dumps(as_squad(lives(64))))
    return path


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder"), 0)


@pytest.fixture(scope="module")
def teacher(data: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that has learnt the questions."""
    return train_teacher(data, encoder, tmp_path_factory.mktemp("teacher") / "checkpoint")


@pytest.fixture(scope="module")
def logits(data: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The soft labels of a teacher, written by two Horovod processes."""
    output = tmp_path_factory.mktemp("logits") / "two"
    under_horovod(2, ["training.teach", "squad", *flags_of_teacher(data, teacher, output)])
    return output


@pytest.mark.horovod
@pytest.mark.slow
def test_two_processes_write_what_one_writes(data: Path, teacher: Path, logits: Path, tmp_path: Path) -> None:
    teach.main(parse(TeachSquadArguments, flags_of_teacher(data, teacher, tmp_path)))
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in logits.iterdir()}
    assert len(list(logits.glob("*.safetensors"))) > 2
    assert json.loads((tmp_path / TEACHER_FILE).read_text()) == json.loads((logits / TEACHER_FILE).read_text())
    torch.testing.assert_close(logits_in(logits), logits_in(tmp_path), atol=2e-3, rtol=2e-3)


@pytest.mark.horovod
@pytest.mark.slow
def test_logits_are_those_of_the_model_for_each_window(data: Path, teacher: Path, logits: Path) -> None:
    args = parse(SquadArguments, [*FLAGS, "--train", str(data), "--output", "-", "--init", str(teacher)])
    model = BertForQuestionAnswering.from_pretrained(teacher).eval()  # type: ignore[no-untyped-call]
    features = SquadData.of(args, str(teacher), model.config).features
    assert len(features) > 48
    rows = iter(logits_in(logits).float())
    for feature in features:
        ids = torch.from_numpy(feature.input_ids).long()[None]
        types = (torch.arange(ids.shape[1]) >= feature.context_offset).long()[None]
        with torch.no_grad():
            output = model(input_ids=ids, token_type_ids=types)
        expected = torch.stack((output.start_logits[0], output.end_logits[0]), -1)
        found = torch.stack([next(rows) for _ in range(ids.shape[1])])
        torch.testing.assert_close(found, expected, atol=4e-3, rtol=4e-3)
    assert next(rows, None) is None


@pytest.mark.horovod
@pytest.mark.slow
def test_a_teacher_that_was_killed_goes_on_where_it_was(
    data: Path, teacher: Path, logits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [0]

    def dies_at_third(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return predict(*args, **options)

    monkeypatch.setattr("training.teach.predict", dies_at_third)
    job = parse(TeachSquadArguments, flags_of_teacher(data, teacher, tmp_path))
    with pytest.raises(KeyboardInterrupt):
        teach.main(job)
    assert not (tmp_path / TEACHER_FILE).exists()
    written = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(written) == 2
    teach.main(job)
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())
    torch.testing.assert_close(logits_in(tmp_path), logits_in(logits), atol=2e-3, rtol=2e-3)


def flip_a_bit(directory: Path) -> None:
    path = directory / "logits-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def say_of_other_teacher(directory: Path) -> None:
    described = json.loads((directory / TEACHER_FILE).read_text())
    described["teacher"]["sha256"] = "0" * 64
    (directory / TEACHER_FILE).write_text(json.dumps(described))


@pytest.mark.parametrize(
    ("spoil", "more", "message"),
    [
        (None, ["--negatives", "0.5"], r"teacher\.json is for other features: --negatives was 0\.1, is 0\.5"),
        (None, ["--max-question-tokens", "4"], r"other features: --max-question-tokens was 16, is 4"),
        (None, ["--seed", "2"], r"other features: --data-seed was 1, is 2"),
        (None, ["--unlabelled-share", "1"], r"other features: --unlabelled-share was 0\.0, is 1\.0"),
        (flip_a_bit, [], r"logits-00001\.safetensors is damaged"),
        (say_of_other_teacher, [], r"logits-00000\.safetensors was written for other teacher"),
        (lambda path: (path / "logits-00002.safetensors").unlink(), [], r"logits-00002\.safetensors cannot be used"),
        (lambda path: (path / TEACHER_FILE).unlink(), [], r"did training\.teach finish\?"),
        (lambda path: (path / TEACHER_FILE).write_text("{}"), [], r"teacher\.json cannot be used"),
    ],
)
def test_soft_labels_that_do_not_fit_are_refused_by_name(
    spoil: Callable[[Path], None] | None,
    more: list[str],
    message: str,
    data: Path,
    encoder: Path,
    logits: Path,
    tmp_path: Path,
) -> None:
    directory = tmp_path / "logits"
    directory.mkdir()
    for path in logits.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    if spoil:
        spoil(directory)
    job = [*FLAGS, "--train", str(data), "--init", str(encoder), "--output", str(tmp_path / "student")]
    with pytest.raises(SystemExit, match=f"--teacher-logits: .*{message}"):
        finetune_squad.main(parse(SquadArguments, [*job, "--teacher-logits", str(directory), *more]))


def test_another_file_under_the_same_flags_is_refused(encoder: Path, logits: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(json.dumps(as_squad(lives(64)[::-1])))
    job = [*FLAGS, "--train", str(path), "--init", str(encoder), "--output", str(tmp_path / "student")]
    with pytest.raises(
        SystemExit, match=r"other features: the flags are the same, so the data or tokenizer\.json diff"
    ):
        finetune_squad.main(parse(SquadArguments, [*job, "--teacher-logits", str(logits)]))


def test_a_directory_of_another_teacher_is_not_mixed(data: Path, teacher: Path, logits: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in teacher.glob("*.json"):
        (other / path.name).write_bytes(path.read_bytes())
    weights = load_file(teacher / "model.safetensors")
    save_file(weights | {"qa_outputs.bias": weights["qa_outputs.bias"] + 1}, other / "model.safetensors")
    with pytest.raises(SystemExit, match=r"--output: .*logits-00000\.safetensors was written for other teacher"):
        teach.main(parse(TeachSquadArguments, flags_of_teacher(data, other, logits)))


def test_an_encoder_without_a_head_teaches_nothing(data: Path, encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"has no tensor qa_outputs\.bias"):
        teach.main(parse(TeachSquadArguments, flags_of_teacher(data, encoder, tmp_path)))


def test_the_divergence_is_the_one_computed_by_hand() -> None:
    # At temperature 2 the teacher has 3/4 and 1/4, the student 1/2 and 1/2; what no answer may be has no share.
    teacher = torch.tensor([[2 * math.log(3), 0.0, -1e9]])
    student = torch.tensor([[1.0, 1.0, -1e9]])
    by_hand = 4 * (0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5))
    assert divergence(student, teacher, 2.0).item() == pytest.approx(by_hand, rel=1e-6)
    assert divergence(teacher, teacher, 2.0).item() == pytest.approx(0, abs=1e-6)


def test_the_loss_has_hard_and_soft_terms_and_ignores_unknown_labels(encoder: Path) -> None:
    tokenizer = WindowTokenizer(Tokenizer.from_file(str(TOKENIZER)), max_seq_len=64, max_question_tokens=16)
    model = BertForQuestionAnswering.from_pretrained(encoder).eval()  # type: ignore[no-untyped-call]
    labelled, other = list(make_features(lives(2), tokenizer))
    features = [labelled, without_label(other)]
    generator = np.random.default_rng(0)
    soft = [generator.normal(size=(len(feature.input_ids), 2)).astype(np.float16) for feature in features]
    found = finetune_squad.span_loss(model, collate(features, soft=soft), 2.0)
    assert found.shape == (2,)
    alone = finetune_squad.span_loss(model, collate([labelled]), 2.0)
    torch.testing.assert_close(found[:1], alone)
    expected = torch.zeros(())
    for feature, taught in zip(features, soft, strict=True):
        places = [0, *range(feature.context_offset, len(feature.input_ids) - 1)]
        ids = torch.from_numpy(feature.input_ids).long()[None]
        types = (torch.arange(ids.shape[1]) >= feature.context_offset).long()[None]
        output = model(input_ids=ids, token_type_ids=types)
        for column, logits in enumerate((output.start_logits[0, places], output.end_logits[0, places])):
            target = (torch.from_numpy(taught[places, column]).float() / 2).softmax(0)
            expected = expected + 4 * functional.kl_div((logits / 2).log_softmax(0), target, reduction="sum") / 2
    torch.testing.assert_close(found[1], expected, rtol=1e-4, atol=1e-4)
    assert features[1].start == UNLABELLED


def losses(output: Path, name: str) -> list[float]:
    return [json.loads(line)[name] for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_a_random_student_comes_close_to_its_teacher(data: Path, teacher: Path, tmp_path: Path) -> None:
    student, texts = write_encoder(tmp_path / "random", 7), tmp_path / "texts.json"
    texts.write_text(json.dumps(as_squad([example for example in lives(96)[64:]])))
    more = ["--unlabelled-share", "1.5", "--unlabelled", str(texts)]
    teach.main(parse(TeachSquadArguments, flags_of_teacher(data, teacher, tmp_path / "logits", *more)))
    job = [*FLAGS, "--train", str(data), "--init", str(student), "--output", str(tmp_path / "student"), *more, *STUDENT]
    finetune_squad.main(parse(SquadArguments, [*job, "--teacher-logits", str(tmp_path / "logits")]))
    soft = losses(tmp_path / "student", "soft")
    assert soft[-1] < 0.1 * soft[0], soft
    models = [BertForQuestionAnswering.from_pretrained(path) for path in (teacher, tmp_path / "student")]
    tokenizer = WindowTokenizer.from_directory(teacher, max_seq_len=64, max_question_tokens=16, overlap=8)
    examples = hold_back_articles(lives(64), 1)[0]
    windows = [window for each in examples for window in tokenizer(each.question, each.context).windows]
    logits = [predictor(model, torch.device("cpu"), "fp32")(windows) for model in models]
    answers = [[best(window, pair) for window, pair in zip(windows, pairs, strict=True)] for pairs in logits]
    assert sum(ours == theirs for ours, theirs in zip(*answers, strict=True)) >= 0.9 * len(windows)


def best(window: Window, logits: Logits) -> list[int]:
    """The best start and end, of [CLS] and the context."""
    places = [0, *range(window.offset, window.offset + window.tokens)]
    return [places[int(values[0, places].argmax())] for values in logits]


@pytest.mark.horovod
@pytest.mark.slow
def test_a_distilled_run_of_two_processes_resumes_bit_for_bit(
    data: Path, encoder: Path, logits: Path, tmp_path: Path
) -> None:
    more = (
        "--teacher-logits",
        str(logits),
        "--dropout",
        "0.1",
        "--epochs",
        "2",
        "--save-every",
        "3",
        "--log-every",
        "1",
    )
    whole = finetune(2, data, encoder, tmp_path / "whole", *more)
    assert len(whole) > 8
    job = [*FLAGS, "--train", str(data), "--init", str(encoder), "--output", str(tmp_path / "halves"), *more]
    under_horovod(2, ["training.finetune_squad", *job, "--stop-after", "5"])
    assert not (tmp_path / "halves" / "model.safetensors").exists()
    assert finetune(2, data, encoder, tmp_path / "halves", *more) == whole
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "halves")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    with pytest.raises(SystemExit, match=r"other settings \(soft_share 0.8, now 0.5\)"):
        finetune_squad.main(parse(SquadArguments, [*job, "--soft-share", "0.5"]))


def test_unlabelled_questions_go_to_other_paragraphs_of_their_article() -> None:
    examples = lives(64)
    made = unlabelled(examples, 2.5, seed=1)
    assert len({example.id for example in made}) == len(made) == 160
    contexts = {example.id: example for example in examples}
    for example in made:
        original = contexts[example.id.partition("-unlabelled")[0]]
        assert (example.question, example.title, example.references) == (original.question, original.title, ())
        assert example.context != original.context
    assert made == unlabelled(examples, 2.5, seed=1) != unlabelled(examples, 2.5, seed=2)


@pytest.mark.parametrize("flags", [["--unlabelled-share", "1"], ["--unlabelled", "x.json"], ["--soft-share", "1.1"]])
def test_what_needs_a_teacher_is_refused_without_one(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(SquadArguments, ["--train", "t", "--output", "o", *flags])
    assert flags[0] in capsys.readouterr().err


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 200))
def test_batches_take_every_sequence_once_and_stay_within_the_limit(lengths: list[int], tokens: int) -> None:
    batches = list(batches_by_length(lengths, tokens))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= tokens
    longest = [max(lengths[index] for index in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)


def test_batched_evaluation_gives_the_logits_of_one_window_at_a_time(teacher: Path) -> None:
    model = BertForQuestionAnswering.from_pretrained(teacher)
    tokenizer = WindowTokenizer.from_directory(teacher, max_seq_len=200, max_question_tokens=16, overlap=8)
    contexts = ["Ada lived in London. " * times for times in (1, 2, 5, 12, 30, 60)]
    windows = [window for context in contexts for window in tokenizer("Where did Ada live?", context).windows]
    assert len({window.length for window in windows}) > 2
    found = predictor(model, torch.device("cpu"), "fp32")(windows)
    for window, (start, end) in zip(windows, found, strict=True):
        tensors = {name: torch.from_numpy(array).long() for name, array in window.tensors().items()}
        with torch.no_grad():
            output = model(**tensors)
        tokens = window.offset + window.tokens + 1
        assert start.shape == end.shape == (1, window.length)
        np.testing.assert_allclose(start[0, :tokens], output.start_logits[0, :tokens], atol=1e-4)
        np.testing.assert_allclose(end[0, :tokens], output.end_logits[0, :tokens], atol=1e-4)


@pytest.mark.parametrize("task", ["MRPC", "STS-B"])
def test_a_glue_student_learns_from_its_teacher(task: str, encoder: Path, tmp_path: Path) -> None:
    write_task(tmp_path, task)
    common = ["--task", task, "--data", str(tmp_path), "--max-seq-len", "32", "--precision", "fp32"]
    run = [*common, "--batch-size", "16", "--learning-rate", "5e-3", "--log-every", "4", "--dropout", "0"]

    def finetune_on(init: Path, output: str, *more: str) -> None:
        job = [*run, "--init", str(init), "--output", str(tmp_path / output), *more]
        finetune_glue.main(parse(GlueArguments, job))

    finetune_on(encoder, "teacher", "--epochs", "8")
    files = ["--init", str(tmp_path / "teacher"), "--output", str(tmp_path / "logits")]
    teach.main(parse(TeachGlueArguments, [*common, *files]))
    taught = ["--teacher-logits", str(tmp_path / "logits"), "--soft-share", "1", "--epochs", "8"]
    finetune_on(write_encoder(tmp_path / "random", 3), "student", *taught)
    soft = losses(tmp_path / "student", "soft")
    assert soft[-1] < 0.2 * soft[0], soft
    with pytest.raises(SystemExit, match=r"--teacher-logits: .*other features: --max-seq-len was 32, is 8"):
        finetune_on(encoder, "other", *taught, "--max-seq-len", "8")


def test_logits_that_float16_cannot_hold_are_refused(
    data: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absurd(model: object, features: list[object], *args: object, **options: object) -> list[object]:
        return [np.full((len(feature.input_ids), 2), 1e6, np.float32) for feature in features]  # type: ignore[attr-defined]

    monkeypatch.setattr("training.teach.predict", absurd)
    with pytest.raises(SystemExit, match="--output: the teacher gives logits that are NaN or too large for float16"):
        teach.main(parse(TeachSquadArguments, flags_of_teacher(data, teacher, tmp_path)))
