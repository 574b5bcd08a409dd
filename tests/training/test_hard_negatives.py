"""Test questions with a replaced name or number: unanswerable by construction, filtered by a teacher, trained on."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertForQuestionAnswering

from bertqa.cli.command import parse
from bertqa.squad import Example, Reference, as_squad, read_squad
from bertqa.windows import WindowTokenizer
from tests.support.lives import FLAGS, lives, train_teacher, write_encoder
from training import finetune_squad
from training.distributed import Alone
from training.hard_negatives import MARK, exchanged, main, mentions
from training.options import HardNegativesArguments, SquadArguments
from training.squad_evaluation import evaluate, has_answer_shares, predictor

CONTEXT = "In 1891 Nikola Tesla built a coil in New York. It made 500,000 volts."
OTHER = "In 1876 Thomas Edison opened Menlo Park. Later Michael Faraday counted 300 lamps there."


def article() -> list[Example]:
    questions = {
        CONTEXT: ["What did Nikola Tesla build in 1891?", "How many volts did it make in New York?"],
        OTHER: ["What did Thomas Edison open in 1876?", "Who opened Menlo Park with 300 lamps?"],
    }
    return [
        Example(f"{n}-{m}", "Electricity", question, context, (Reference(context[:2], 0),))
        for n, (context, each) in enumerate(questions.items())
        for m, question in enumerate(each)
    ]


def test_names_and_numbers_are_found_with_their_kind_and_place() -> None:
    text = "Where did Nikola Tesla live in 1891, and who paid 1,200.50 to New York? The answer in May costs 20"
    found = {(mention.kind, mention.words) for mention in mentions(text)}
    assert found == {
        ("name of 2 after ", "Nikola Tesla"),
        ("name of 2 after to", "New York"),
        ("year", "1891"),
        ("number of 6", "1,200.50"),
        ("number of 2", "20"),
    }


@given(st.text(alphabet="AaBb 19,.'é?-\n", max_size=60))
def test_mentions_are_where_they_say(text: str) -> None:
    for mention in mentions(text):
        assert text.startswith(mention.words, mention.start)
        assert mention.words.strip() == mention.words != ""


@given(seed=st.integers(0, 50))
def test_what_is_exchanged_was_in_the_paragraph_and_what_replaces_it_is_not(seed: int) -> None:
    originals = {example.id: example for example in article()}
    made = exchanged(article(), 0.99, seed)
    assert made
    for example in made:
        original = originals[example.id.removesuffix(MARK).rpartition("-")[0]]
        assert (example.context, example.title, example.references) == (original.context, original.title, ())
        before, after = original.question, example.question
        new = {mention.words for mention in mentions(after)} - {mention.words for mention in mentions(before)}
        old = {mention.words for mention in mentions(before)} - {mention.words for mention in mentions(after)}
        assert len(new) == len(old) == 1
        assert old.pop() in example.context
        assert new.pop() not in example.context


def test_the_share_is_kept_and_the_seed_decides() -> None:
    examples = [
        Example(f"{e.id}-{n}", f"{e.title} {n}", e.question, e.context, e.references)
        for n in range(10)
        for e in article()
    ]
    made = exchanged(examples, 0.25, seed=1)
    assert len(made) == 10
    assert made == exchanged(examples, 0.25, seed=1) != exchanged(examples, 0.25, seed=2)
    assert len({example.id for example in made}) == len(made)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions of lives whose names are exchanged for those of others of the same article."""
    path = tmp_path_factory.mktemp("hard") / "train.json"
    path.write_text(json.dumps(as_squad(lives(64))))
    return path


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder"), 0)


@pytest.fixture(scope="module")
def teacher(file: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_teacher(file, encoder, tmp_path_factory.mktemp("teacher") / "checkpoint")


def test_only_what_the_teacher_finds_unanswerable_is_kept(
    file: Path,
    teacher: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    everything = tmp_path / "all.json"
    main(parse(HardNegativesArguments, ["--train", str(file), "--output", str(everything), "--share", "0.5"]))
    made = read_squad(everything)
    assert len(made) == 32
    tokenizer = WindowTokenizer.from_directory(teacher, max_seq_len=64, max_question_tokens=16, overlap=8)
    model = BertForQuestionAnswering.from_pretrained(teacher)
    answered = evaluate(made, tokenizer, predictor(model, torch.device("cpu"), "fp32"), Alone())
    margins = {example.id: decoded.null_margin for example, decoded in answered}
    threshold = sorted(margins.values())[len(margins) // 2] + 1e-3
    job = ["--train", str(file), "--output", str(tmp_path / "kept.json"), "--share", "0.5", "--teacher", str(teacher)]
    main(parse(HardNegativesArguments, [*job, "--precision", "fp32", "--null-threshold", str(threshold)]))
    kept = {example.id for example in read_squad(tmp_path / "kept.json")}
    assert kept == {identifier for identifier, margin in margins.items() if margin > threshold}
    assert 0 < len(kept) < len(made)
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (printed["made"], printed["kept"]) == (32, len(kept))


def test_a_run_trains_on_some_and_reports_on_the_held_back(
    file: Path,
    encoder: Path,
    tmp_path: Path,
) -> None:
    hard = tmp_path / "hard.json"
    main(parse(HardNegativesArguments, ["--train", str(file), "--output", str(hard), "--share", "0.5"]))
    job = [*FLAGS, "--train", str(file), "--init", str(encoder), "--output", str(tmp_path / "out"), "--epochs", "1"]
    finetune_squad.main(parse(SquadArguments, [*job, "--impossible", str(hard)]))
    report = json.loads((tmp_path / "out" / "training_report.json").read_text())
    shares = report["has_answer"]
    made = read_squad(hard)
    held = {each.title for each in read_squad(tmp_path / "out" / "gate.json")}
    assert shares["answerable"]["total"] == report["held_back"]["total"] == 16
    assert shares["exchanged"]["total"] == sum(example.title in held for example in made) > 0
    assert all(0 <= share["right"] <= 100 for share in shares.values())
    answerable = tmp_path / "answerable.json"
    answerable.write_text(json.dumps(as_squad(lives(2))))
    with pytest.raises(SystemExit, match="--impossible: 2 questions have an answer, 'q0' first"):
        finetune_squad.main(parse(SquadArguments, [*job, "--impossible", str(answerable)]))


def test_shares_count_what_is_right_at_the_threshold(teacher: Path) -> None:
    tokenizer = WindowTokenizer.from_directory(teacher, max_seq_len=64, max_question_tokens=16, overlap=8)
    model = BertForQuestionAnswering.from_pretrained(teacher)
    examples = [*lives(4), Example("x", "t", "Where did Ada live?", "Nothing is known.", ())]
    answered = evaluate(examples, tokenizer, predictor(model, torch.device("cpu"), "fp32"), Alone())
    low = has_answer_shares(answered, -1e6, {"x"})
    assert low == {"answerable": {"right": 0.0, "total": 4}, "exchanged": {"right": 100.0, "total": 1}}
    high = has_answer_shares(answered, 1e6, set())
    assert high == {"answerable": {"right": 100.0, "total": 4}, "unanswerable": {"right": 0.0, "total": 1}}
