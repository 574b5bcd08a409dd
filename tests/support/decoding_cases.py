"""Cases that decode answers from a text and random logits, and checks of their properties.

The property tests draw cases with hypothesis; the fuzzer of ``make chaos`` makes them from bytes.
"""

from dataclasses import dataclass
from typing import get_args

import numpy as np
from tokenizers import Tokenizer

from bertqa.graphemes import OffsetUnit, offset_in, widen_to_graphemes
from bertqa.spans import Logits
from bertqa.windows import WindowTokenizer
from tests.support.invariants import (
    check_decoded,
    check_tokens_are_where_they_say,
    check_windows,
    cluster_bounds,
    cut,
    of_either_unicode,
)
from tests.support.paths import CHECKPOINT

REFUSALS = ("question: ", "context: ", "overlap: ", "max_seq_len: ")
"""Every error message begins with the name of a field."""
TOKENIZER = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
WINDOW_TOKENIZER = WindowTokenizer.from_directory(
    CHECKPOINT, max_seq_len=48, max_question_tokens=8, overlap=8, buckets=(32, 48)
)
"""Windows so short that most texts need several."""


@dataclass(frozen=True, slots=True)
class Case:
    """A question about some texts, and the options for its answer."""

    question: str
    contexts: tuple[str, ...]
    overlap: int | None
    max_seq_len: int
    top_k: int
    max_answer_tokens: int
    words: bool
    seed: int  # of the logits


def check_case(case: Case) -> bool:
    """Check that a case is answered correctly, or refused with its field named; return whether it was answered."""
    documents = []
    for context in case.contexts:
        try:
            windows = WINDOW_TOKENIZER(case.question, context, overlap=case.overlap, max_seq_len=case.max_seq_len)
        except ValueError as error:
            if not str(error).startswith(REFUSALS):
                raise
            return False
        check_windows(windows, max_seq_len=case.max_seq_len, overlap=case.overlap, buckets=WINDOW_TOKENIZER.buckets)
        check_tokens_are_where_they_say(windows, TOKENIZER)
        documents.append(windows)
    random = np.random.default_rng(case.seed)
    logits: list[list[Logits]] = []
    for windows in documents:
        pairs = (random.normal(scale=6, size=(2, 1, w.length)).astype(np.float32) for w in windows.windows)
        logits.append([(start, end) for start, end in pairs])
    decoded = check_decoded(
        documents, logits, top_k=case.top_k, max_answer_tokens=case.max_answer_tokens, words=case.words
    )
    for answer in decoded.answers:
        context = case.contexts[answer.context_index]
        for unit in get_args(OffsetUnit):
            start, end = offset_in(context, answer.start, unit), offset_in(context, answer.end, unit)
            assert cut(context, start, end, unit) == answer.text
    return True


def check_snapping(text: str, places: tuple[int, int]) -> bool:
    """Check that a span is widened to an independent implementation's clusters; return whether there was a text."""
    text = "".join(filter(of_either_unicode, text))
    if not text:
        return False
    start, end = sorted(place % (len(text) + 1) for place in places)
    starts, ends = widen_to_graphemes(text, np.array([start], np.int32), np.array([end], np.int32))
    found = int(starts[0]), int(ends[0])
    bounds = cluster_bounds(text)
    assert found == (max(b for b in bounds if b <= start), min(b for b in bounds if b >= end)), (text, start, end)
    return True
