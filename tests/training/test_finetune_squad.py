"""Test the SQuAD fine-tuning job: its features and batches, and the job in real processes under horovodrun."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertForQuestionAnswering

from bertqa.cli.command import parse
from bertqa.manifest import Settings
from bertqa.spans import Answer, Decoded
from bertqa.squad import Example, Reference, as_squad, read_squad
from bertqa.windows import WindowTokenizer
from tests.support.lives import FLAGS, TOKENIZER, finetune, lives, write_encoder
from training.encoders import bert_flops
from training.finetune_squad import main, span_loss
from training.options import SquadArguments
from training.squad_evaluation import as_report, fit_null_threshold
from training.squad_features import Feature, collate, hold_back_articles, make_features, negatives


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("squad") / "train.json"
    path.write_text(json.dumps(as_squad(lives(64))))
    return path


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder"), seed=0)


@pytest.fixture(scope="module")
def trained(data: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """A checkpoint that two Horovod processes trained, and its losses."""
    output = tmp_path_factory.mktemp("two") / "checkpoint"
    return output, finetune(2, data, encoder, output)


@pytest.mark.horovod
@pytest.mark.slow
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
    WindowTokenizer.from_directory(output, max_seq_len=64, max_question_tokens=settings.max_question_tokens)
    gate, calibration = (read_squad(output / name) for name in ("gate.json", "calibration.json"))
    assert {example.title for example in gate}.isdisjoint(example.title for example in calibration)


@pytest.mark.horovod
@pytest.mark.slow
def test_the_number_of_processes_does_not_change_the_run(
    trained: tuple[Path, list[float]], data: Path, encoder: Path, tmp_path: Path
) -> None:
    # Dropout too is that of the micro-batches, of which each of the two processes had one.
    alone = finetune(1, data, encoder, tmp_path / "one", "--micro-batch-size", "4")
    assert alone == pytest.approx(trained[1], rel=1e-3)


def test_squad_v2_is_trained_on_its_own_unanswerable_questions(data: Path, encoder: Path, tmp_path: Path) -> None:
    examples = lives(64)
    path, output = tmp_path / "v2.json", tmp_path / "checkpoint"
    path.write_text(json.dumps(as_squad(examples + negatives(examples, 0.5, seed=1))))
    main(
        parse(
            SquadArguments,
            [*FLAGS, "--train", str(path), "--dev", str(path), "--init", str(encoder), "--output", str(output)],
        )
    )
    report = json.loads((output / "training_report.json").read_text())
    assert report["arguments"]["negatives"] == "0.0"
    assert report["held_back"]["NoAns_total"] > 0
    assert report["dev"]["total"] == len(read_squad(path))
    assert report["dev"]["best_f1"] >= report["dev"]["f1"] > 0
    assert all(example.references for example in read_squad(output / "gate.json"))


@pytest.mark.horovod
@pytest.mark.slow
def test_no_epoch_measures_and_completes_what_there_is(
    trained: tuple[Path, list[float]], data: Path, tmp_path: Path
) -> None:
    output, given = tmp_path / "checkpoint", load_file(trained[0] / "model.safetensors")
    job = [*FLAGS, "--train", str(data), "--init", str(trained[0]), "--output", str(output), "--epochs", "0"]
    main(parse(SquadArguments, job))
    written = load_file(output / "model.safetensors")
    assert written.keys() == given.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in given.items())
    assert not (output / "metrics.jsonl").read_text()
    for name in ("gate.json", "calibration.json", "config.json", "tokenizer.json"):
        assert json.loads((output / name).read_text()) == json.loads((trained[0] / name).read_text()), name
    before, after = (Settings.of_checkpoint(path) for path in (trained[0], output))
    assert after.null_threshold == pytest.approx(before.null_threshold, abs=0.01)  # fitted with fp32 weights, now fp16
    assert json.loads((output / "training_report.json").read_text())["held_back"]["total"] == 16


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train", "missing.json"], r"--train: .*missing\.json"),
        (["--max-seq-len", "600"], "--max-seq-len 600: .* has 512 positions"),
        (["--max-question-tokens", "80"], "--max-question-tokens, --overlap: max_question_tokens: must be from 1 to"),
        (["--batch-size", "999"], "--train: .* are fewer than one batch of 999"),
    ],
)
def test_what_cannot_be_trained_is_refused_with_its_flag(
    flags: list[str], message: str, data: Path, encoder: Path, tmp_path: Path
) -> None:
    job = [*FLAGS, "--train", str(data), "--init", str(encoder), "--output", str(tmp_path), *flags]
    with pytest.raises(SystemExit, match=message):
        main(parse(SquadArguments, job))


def test_labels_mark_the_answer_in_the_window_that_holds_it() -> None:
    tokenizer = WindowTokenizer(Tokenizer.from_file(str(TOKENIZER)), max_seq_len=40, max_question_tokens=16, overlap=10)
    context = "filler words come first. " * 12 + "The winner was the Denver Broncos. " + "more words follow. " * 12
    start = context.index("Denver Broncos")
    example = Example("1", "t", "Who won?", context, (Reference("Denver Broncos", start),))
    features = list(make_features([example], tokenizer))
    labelled = [feature for feature in features if feature.start]
    assert len(features) > 3
    assert 1 <= len(labelled) <= 2
    plain = Tokenizer.from_file(str(TOKENIZER))
    for feature in labelled:
        assert plain.decode(feature.input_ids[feature.start : feature.end + 1].tolist()) == "denver broncos"
    assert all((feature.start, feature.end) == (0, 0) for feature in features if not feature.start)


def test_a_batch_is_padded_and_lets_only_cls_and_context_be_answers() -> None:
    tokenizer = WindowTokenizer(Tokenizer.from_file(str(TOKENIZER)), max_seq_len=64, max_question_tokens=16)
    features = list(make_features(lives(3), tokenizer))
    batch = collate(features)
    assert batch.input_ids.shape == batch.allowed.shape
    assert batch.input_ids.shape[1] % 16 == 0
    for row, feature in enumerate(features):
        tokens = len(feature.input_ids)
        assert batch.attention_mask[row].sum() == tokens
        allowed = {0, *range(feature.context_offset, tokens - 1)}
        assert set(batch.allowed[row].nonzero().flatten().tolist()) == allowed
        assert int(batch.starts[row]) in allowed


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


def test_the_report_of_squad_v2_has_the_official_names() -> None:
    answerable = Example("1", "t", "q", "Oslo", (Reference("Oslo", 0),))
    impossible = Example("2", "t", "q", "Oslo", ())
    answered = [
        (answerable, Decoded((Answer("Oslo", 0.5, 0, 4, 0),), True, 0.1, -2.0)),
        (impossible, Decoded((Answer("Oslo", 0.5, 0, 4, 0),), True, 0.1, 1.0)),
    ]
    report = as_report(answered, 2.0)
    assert report["exact"] == report["f1"] == 50.0
    assert (report["HasAns_exact"], report["NoAns_exact"]) == (100.0, 0.0)
    assert (report["total"], report["HasAns_total"], report["NoAns_total"]) == (2, 1, 1)
    assert report["best_exact"] == report["best_f1"] == 100.0
    assert -2 < report["best_f1_thresh"] < 1
    assert as_report(answered[:1], -9.0) == {"exact_match": 100.0, "f1": 100.0, "total": 1}  # v1.1 knows no "no answer"


def test_flops_are_those_of_the_matrix_products(encoder: Path) -> None:
    model = BertForQuestionAnswering.from_pretrained(encoder, attn_implementation="eager")
    features = [Feature(np.ones(16, np.int32), 4, 5, 6)] * 3
    batch = collate(features)
    with FlopCounterMode(display=False) as counter:
        span_loss(model, batch).sum().backward()  # type: ignore[no-untyped-call]
    assert bert_flops(model.config, batch.lengths, 2 * 32 * 48) == counter.get_total_flops()


@pytest.mark.parametrize("flags", [["--batch-size", "0"], ["--epochs", "-1"], ["--negatives", "2"], ["--warmup", "1"]])
def test_flags_out_of_range_are_refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(SquadArguments, ["--train", "t", "--output", "o", *flags])
    assert flags[0] in capsys.readouterr().err
