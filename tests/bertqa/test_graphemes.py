import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertqa import graphemes
from bertqa.graphemes import offset_in, widen_to_graphemes
from tests.support.invariants import cluster_bounds, of_either_unicode

# Everything that clusters are made of: emoji with joiners and skin tones, flags, jamo, marks, controls, plain letters.
ALPHABET = [
    *"abc XYZ09.,\r\n\t\x00",
    *"\u0301\u0308\u200d\ufe0f\u20e3",
    *"👨👩👧👍🏽🇰🇷🇯🇵😀",
    *"\u1100\u1161\u11a8가각힣",
    *"漢字かなカ\u3099",
    *"éüñЖΩעבمرक्षि\u0600กำ",
]

characters = (st.sampled_from(ALPHABET) | st.characters(exclude_categories=["Cs"])).filter(of_either_unicode)


FAMILY = "👨\u200d👩\u200d👧"


def widened(text: str, start: int, end: int) -> tuple[int, int]:
    starts, ends = widen_to_graphemes(text, np.array([start], np.int32), np.array([end], np.int32))
    return int(starts[0]), int(ends[0])


@given(text=st.text(characters, max_size=200))
@settings(max_examples=600, deadline=None)
def test_widening_gives_the_clusters_of_an_independent_implementation(text: str) -> None:
    bounds = cluster_bounds(text)
    places = np.arange(len(text) + 1, dtype=np.int32)
    starts, ends = widen_to_graphemes(text, places, places)
    assert starts.tolist() == [max(b for b in bounds if b <= place) for place in places]
    assert ends.tolist() == [min(b for b in bounds if b >= place) for place in places]


@given(
    parts=st.lists(
        st.tuples(st.sampled_from([*ALPHABET, FAMILY, "🇰🇷", "🇰", "‼\u200d"]), st.sampled_from([1, 2, 63, 64, 65, 300])),
        max_size=8,
    )
)
@settings(max_examples=200, deadline=None)
def test_runs_longer_than_a_piece_are_clusters_all_the_same(parts: list[tuple[str, int]]) -> None:
    text = "".join(character * count for character, count in parts)
    bounds = cluster_bounds(text)
    places = np.arange(len(text) + 1, dtype=np.int32)
    starts, ends = widen_to_graphemes(text, places, places)
    assert sorted({*starts.tolist()}) == sorted({*ends.tolist()}) == sorted({*bounds})


@pytest.mark.parametrize(
    ("text", "place", "expected"),
    [
        ("x" * 10_000 + FAMILY + "y" * 10_000, 10_002, (10_000, 10_005)),
        ("e" + "\u0301" * 500, 400, (0, 501)),
        ("🇰🇷" * 300, 301, (300, 302)),
        ("a\r\nb", 2, (1, 3)),
        ("a\nb", 1, (1, 2)),
    ],
)
def test_far_joins_are_seen(text: str, place: int, expected: tuple[int, int]) -> None:
    assert widened(text, place, place + 1) == expected


LONG_RUNS = {
    "marks": "e" + "\u0301" * 199_999,
    "joiners": "‼\u200d" * 100_000,
    "flags": "🇰🇷" * 100_000,
    "flags after a long cluster": "e" + "\u0301" * 100_000 + "🇰" * 99_999,
    "prepended marks": "\u0600" * 200_000,
    "jamo": "\u1100" * 200_000,
    "clusters of two": "e\u0301" * 100_000,
    "every character": "".join(map(chr, range(0x100, 0x100 + 200_000))).encode("utf-8", "ignore").decode(),
}


@pytest.mark.parametrize("text", LONG_RUNS.values(), ids=LONG_RUNS)
def test_time_is_linear_in_the_text_whatever_it_holds(text: str) -> None:
    # Oniguruma alone takes seven minutes for the flags: it counts those before each.
    checks = 0

    def check() -> None:
        nonlocal checks
        checks += 1

    began = time.thread_time()
    widen_to_graphemes(text, np.zeros(1, np.int32), np.zeros(1, np.int32), check=check)
    assert time.thread_time() - began < 10
    assert checks


@pytest.mark.parametrize(
    "sentence", ["مرحبا بكم في العالم ", "ที่นี่มีคนมาก", "नमस्ते दुनिया ", "👍🏽😀", "漢字かな", "e\u0301" * 3]
)
def test_a_text_is_segmented_once_and_in_pieces(sentence: str, segmented: Callable[[], list[int]]) -> None:
    text = sentence * 2_000
    places = np.arange(len(text) + 1, dtype=np.int32)
    widen_to_graphemes(text, places, places)
    assert max(segmented(), default=0) <= 64
    assert sum(segmented()) <= 1.5 * len(text)


@pytest.fixture
def segmented(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[int]]:
    """Lengths of what the regular expression was asked to segment."""
    lengths: list[int] = []

    class Recorded:
        def pre_tokenize_str(self, piece: str) -> object:
            lengths.append(len(piece))
            return clusters.pre_tokenize_str(piece)

    clusters = graphemes._CLUSTERS
    monkeypatch.setattr(graphemes, "_CLUSTERS", Recorded())
    return lambda: lengths


def test_what_a_check_raises_ends_the_work(segmented: Callable[[], list[int]]) -> None:
    def check() -> None:
        raise TimeoutError

    text = "e\u0301" * 50_000
    with pytest.raises(TimeoutError):
        widen_to_graphemes(text, np.zeros(1, np.int32), np.zeros(1, np.int32), check=check)
    assert sum(segmented()) < 1_000


def test_no_two_of_the_characters_that_stand_alone_join() -> None:
    # All pairs are too many; one of each kind that the standard knows, beside each of the others, is all that matters.
    text = "a가각漢か‼😀क\u200b\n\x00é"
    for first in text:
        for second in text:
            assert cluster_bounds(first + second) == [0, 1, 2]
            assert graphemes._kind_of(first) == graphemes._kind_of(second) == graphemes._ALONE


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60), data=st.data())
def test_offsets_in_other_units_cut_the_encoded_text_at_the_same_place(text: str, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(text)))
    assert text.encode()[: offset_in(text, position, "byte")].decode() == text[:position]
    assert text.encode("utf-16-le")[: 2 * offset_in(text, position, "utf16")].decode("utf-16-le") == text[:position]
    assert offset_in(text, position, "codepoint") == position


@pytest.mark.parametrize(("unit", "expected"), [("codepoint", 2), ("utf16", 3), ("byte", 6)])
def test_units_differ_where_they_should(unit: str, expected: int) -> None:
    assert offset_in("é😀x", 2, unit) == expected  # type: ignore[arg-type]
