"""Words that are remembered: a text has the tokens that the tokenizer gives it, whatever was asked before."""

import string
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers

from bertqa import plain_words
from bertqa.plain_words import PlainWords
from tests.support.decoding_cases import TOKENIZER

ALPHABET = string.ascii_lowercase + string.digits + string.punctuation + " \t\n\r"


def plain() -> Tokenizer:
    tokenizer = Tokenizer.from_str(TOKENIZER.to_str())
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


PLAIN = plain()
WORDS = PlainWords(PLAIN)  # one for all examples: most of their words are remembered
TEXTS = st.one_of(
    st.text(ALPHABET, max_size=200),
    st.lists(st.sampled_from(["the", "tower", "[sep]", "##s", "it's", "2,000", "_", "zzzq", "\r\n"]), max_size=60).map(
        " ".join
    ),
)


def expected(text: str) -> np.ndarray:
    encoding = PLAIN.encode(text, add_special_tokens=False)
    rows = [encoding.ids, [start for start, _ in encoding.offsets], [end for _, end in encoding.offsets]]
    return np.array([*rows, encoding.word_ids], dtype=np.int32).reshape(4, -1)


@given(TEXTS)
def test_a_text_has_the_tokens_that_the_tokenizer_gives(text: str) -> None:
    found = WORDS.tokens(text)
    assert found is not None
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, expected(text))


def test_a_text_with_a_very_long_word_is_left_to_the_tokenizer() -> None:
    words = PlainWords(PLAIN)
    assert words.tokens("the " + "a" * 33) is None
    assert words.tokens("the " + "a" * 32) is not None


def test_memory_is_bounded_and_forgetting_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_words, "_MOST", 50)
    words = PlainWords(PLAIN)
    for number in range(200):
        text = f"the tower {number} of paris, {number + 7}"
        np.testing.assert_array_equal(words.tokens(text), expected(text))
        assert len(words._table) <= 50


def test_threads_that_make_each_other_forget_get_their_own_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_words, "_MOST", 20)
    words = PlainWords(PLAIN)
    texts = [f"the {number} towers of {number * 3}" for number in range(300)]
    with ThreadPoolExecutor(4) as threads:
        for text, found in zip(texts, threads.map(words.tokens, texts), strict=True):
            np.testing.assert_array_equal(found, expected(text))
