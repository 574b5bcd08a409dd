"""Test decoding of arbitrary text: exact, distinct, ranked spans, or an error that names the field."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.decoding_cases import Case, check_case, check_snapping
from tests.support.texts import SURROGATES, TEXTS

CASES = st.builds(
    Case,
    question=st.one_of(TEXTS.map(lambda text: f"who {text[:40]}"), TEXTS, SURROGATES),
    contexts=st.lists(st.one_of(TEXTS, TEXTS, SURROGATES), min_size=1, max_size=3).map(tuple),
    overlap=st.none() | st.integers(0, 50),
    max_seq_len=st.integers(4, 49),
    top_k=st.integers(1, 30),
    max_answer_tokens=st.integers(1, 40),
    words=st.booleans(),
    seed=st.integers(0, 255),
)


def test_every_case_is_answered_right_or_refused_by_name() -> None:
    ended: Counter[bool] = Counter()

    @settings(max_examples=1_000)
    @given(CASES)
    def examine(case: Case) -> None:
        ended[check_case(case)] += 1

    examine()
    assert min(ended[True], ended[False]) > 100, ended


@settings(max_examples=500)
@given(TEXTS, st.tuples(st.integers(0, 400), st.integers(0, 400)))
def test_a_span_is_widened_to_the_clusters_of_an_independent_implementation(text: str, places: tuple[int, int]) -> None:
    check_snapping(text, places)
