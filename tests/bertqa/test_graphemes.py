import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertqa import graphemes
from bertqa.graphemes import offset_in, snap_to_graphemes
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


@given(text=st.text(characters, min_size=1, max_size=200), data=st.data())
@settings(max_examples=600, deadline=None)
def test_snapping_gives_the_clusters_of_an_independent_implementation(text: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    bounds = cluster_bounds(text)
    expected = (max(b for b in bounds if b <= start), min(b for b in bounds if b >= end))
    assert snap_to_graphemes(text, start, end) == expected


def test_only_a_neighbourhood_is_segmented_and_far_joins_are_still_seen() -> None:
    family = "👨\u200d👩\u200d👧"
    zalgo = "e" + "\u0301" * 500
    assert snap_to_graphemes("x" * 10_000 + family + "y" * 10_000, 10_002, 10_003) == (10_000, 10_005)
    assert snap_to_graphemes(zalgo, 400, 401) == (0, 501)
    assert snap_to_graphemes("🇰🇷" * 300, 301, 302) == (300, 302)


@pytest.mark.parametrize("sentence", ["مرحبا بكم في العالم ", "ที่นี่มีคนมาก", "नमस्ते दुनिया ", "👍🏽😀", "漢字かな"])
def test_no_script_makes_a_long_text_be_segmented_whole(sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, segmented = sentence * 2_000, []

    class Recorded:
        def pre_tokenize_str(self, piece: str) -> object:
            segmented.append(len(piece))
            return clusters.pre_tokenize_str(piece)

    clusters = graphemes._CLUSTERS
    monkeypatch.setattr(graphemes, "_CLUSTERS", Recorded())
    for position in range(len(text) // 2, len(text) // 2 + len(sentence)):
        snap_to_graphemes(text, position, position + 1)
    assert max(segmented) < 100


def test_an_empty_span_stays() -> None:
    assert snap_to_graphemes("e\u0301", 1, 1) == (1, 1)


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60), data=st.data())
def test_offsets_in_other_units_cut_the_encoded_text_at_the_same_place(text: str, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(text)))
    assert text.encode()[: offset_in(text, position, "byte")].decode() == text[:position]
    assert text.encode("utf-16-le")[: 2 * offset_in(text, position, "utf16")].decode("utf-16-le") == text[:position]
    assert offset_in(text, position, "codepoint") == position


@pytest.mark.parametrize(("unit", "expected"), [("codepoint", 2), ("utf16", 3), ("byte", 6)])
def test_units_differ_where_they_should(unit: str, expected: int) -> None:
    assert offset_in("é😀x", 2, unit) == expected  # type: ignore[arg-type]
