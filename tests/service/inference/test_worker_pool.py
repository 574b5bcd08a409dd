"""The estimate of what tokenizing costs at worst: what is short by it may run on the event loop."""

import time

import pytest

from service.inference.worker_pool import INLINE_S, tokenizing_s
from tests.support.decoding_cases import WINDOW_TOKENIZER


def test_one_odd_character_does_not_make_a_text_a_long_one() -> None:
    english = "The tower of London is old. " * 40  # 1,120 characters
    assert tokenizing_s(english) < INLINE_S
    assert tokenizing_s(english + "– café “quoted”") < INLINE_S
    assert tokenizing_s(english + "a" * 30) < INLINE_S


@pytest.mark.parametrize("text", ["각" * 1_000, "각각 " * 400, "q" * 1_000, "é" * 30 * 40, "漢" * 1_000])
def test_texts_of_slow_words_are_long_ones(text: str) -> None:
    assert tokenizing_s(text) > INLINE_S


@pytest.mark.parametrize(
    "text",
    ["qz " * 660, ("q" * 24 + " ") * 66, "–q " * 30 + "qz " * 300, ("q" * 24 + " ") * 50 + "é", "é " * 100],
)
def test_what_is_estimated_as_short_is_short(text: str) -> None:
    estimate = tokenizing_s(text)
    assert estimate < INLINE_S
    WINDOW_TOKENIZER("who", text)
    took = []
    for _ in range(5):
        began = time.thread_time()
        WINDOW_TOKENIZER("who", text)
        took.append(time.thread_time() - began)
    assert min(took) < 10 * INLINE_S, "with room for a slow machine"
