import json
from pathlib import Path

import pytest

from bertqa.squad import (
    Example,
    MalformedSquad,
    Reference,
    as_squad,
    exact_match,
    f1,
    normalize,
    read_squad,
    score,
    score_by_kind,
)

EXAMPLES = [
    Example("1", "Denver", "Who won?", "The Denver Broncos won.", (Reference("Denver Broncos", 4),)),
    Example("2", "Denver", "When?", "The Denver Broncos won.", ()),
    Example("3", "Oslo", "Where?", "In Oslo 😀 it snows.", (Reference("Oslo", 3), Reference("Oslo 😀", 3))),
]


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "squad.json"
    path.write_text(json.dumps(as_squad(EXAMPLES)))
    assert read_squad(path) == EXAMPLES


def spoiled(place: str, value: object) -> str:
    document = json.loads(json.dumps(as_squad(EXAMPLES)))
    holder = document
    *path, last = [int(key) if key.isdigit() else key for key in place.split(".")]
    for key in path:
        holder = holder[key]
    if value is None:
        del holder[last]
    else:
        holder[last] = value
    return json.dumps(document)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "must be an object"),
        (spoiled("data", None), "the field 'data' is missing"),
        (spoiled("data.1.paragraphs", {}), r"data\[1\]\.paragraphs: must be of type list"),
        (spoiled("data.0.paragraphs.0.context", 3), r"data\[0\]\.paragraphs\[0\]\.context: must be of type str"),
        (spoiled("data.0.paragraphs.0.qas.0.id", None), r"qas\[0\]: the field 'id' is missing"),
        (spoiled("data.0.paragraphs.0.qas.0.answers.0.answer_start", True), r"answers\[0\]\.answer_start: must be of"),
        (
            spoiled("data.0.paragraphs.0.qas.0.answers.0.answer_start", 5),
            r"data\[0\]\.paragraphs\[0\]\.qas\[0\]\.answers\[0\]: "
            r"the context does not contain 'Denver Broncos' at character 5",
        ),
    ],
)
def test_a_malformed_file_is_refused_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(MalformedSquad, match=message) as caught:
        read_squad(path)
    assert str(path) in str(caught.value)


# Pairs scored by hand after the rules of the official script.
@pytest.mark.parametrize(
    ("predicted", "reference", "exact", "overlap"),
    [
        ("the Denver Broncos", "Denver Broncos!", 1.0, 1.0),
        ("Broncos", "Denver Broncos", 0.0, 2 / 3),
        ("an apple a day", "apple day", 1.0, 1.0),
        ("red red blue", "red blue blue", 0.0, 2 / 3),
        ("", "", 1.0, 1.0),
        ("the", "", 1.0, 1.0),
        ("", "Oslo", 0.0, 0.0),
        ("U.S.", "us", 1.0, 1.0),
        ("theatre", "atre", 0.0, 0.0),
    ],
)
def test_exact_match_and_f1(predicted: str, reference: str, exact: float, overlap: float) -> None:
    assert exact_match(predicted, reference) == exact
    assert f1(predicted, reference) == pytest.approx(overlap)


def test_normalization_keeps_letters_of_other_scripts() -> None:
    assert normalize("  The CAFÉ,\tin 서울! ") == "café in 서울"


def test_a_score_takes_the_best_reference_and_counts_missing_predictions_as_wrong() -> None:
    result = score(EXAMPLES, {"1": "Broncos", "2": ""})
    assert result.total == 3
    assert result.exact_match == pytest.approx(100 / 3)
    assert result.f1 == pytest.approx(100 * (2 / 3 + 1) / 3)
    assert score(EXAMPLES[2:], {"3": "Oslo 😀"}).exact_match == 100.0


def test_nothing_to_score_is_an_error() -> None:
    with pytest.raises(ValueError, match="no example"):
        score([], {})


def test_the_scores_of_v2_are_told_by_kind_of_question() -> None:
    empty = Example("4", "Oslo", "Which?", "In Oslo it snows.", (Reference("In", 0), Reference("the", 0)))
    report = score_by_kind([*EXAMPLES, empty], {"1": "Broncos", "2": "Denver", "3": "", "4": "in"})
    assert report == pytest.approx(
        {
            **{"exact": 100 / 4, "f1": 100 * (2 / 3 + 1) / 4, "total": 4},
            **{"HasAns_exact": 100 / 3, "HasAns_f1": 100 * (2 / 3 + 1) / 3, "HasAns_total": 3},
            **{"NoAns_exact": 0.0, "NoAns_f1": 0.0, "NoAns_total": 1},
        }
    )
    # A reference of articles alone is none, as in the official script.
    assert score_by_kind([empty], {"4": ""})["exact"] == 0.0
    assert score_by_kind(EXAMPLES[:1], {"1": "Denver Broncos"}) == {
        **{"exact": 100.0, "f1": 100.0, "total": 1, "HasAns_exact": 100.0, "HasAns_f1": 100.0, "HasAns_total": 1}
    }
