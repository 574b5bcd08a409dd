"""Coverage-guided fuzzing of windows, spans and graphemes: ``python -m tests.chaos.fuzz_decoding COUNT SEED``.

A process of its own, for libFuzzer takes the whole process. Needs atheris, which is not built for every Python: see
the group ``fuzz`` of pyproject.toml. Ends with one line of JSON: how many inputs, and how many were refused.
"""

import json
import sys
from typing import get_args

import atheris

with atheris.instrument_imports(include=["bertqa.windows", "bertqa.spans", "bertqa.graphemes"]):
    from bertqa.graphemes import OffsetUnit, offset_in, snap_to_graphemes
    from bertqa.spans import Logits
    from bertqa.windows import WindowMaker

import numpy as np
from tokenizers import Tokenizer

from tests.support.invariants import (
    check_decoded,
    check_tokens_are_where_they_say,
    check_windows,
    cluster_bounds,
    cut,
    of_either_unicode,
)
from tests.support.paths import CHECKPOINT

counts = {"inputs": 0, "refused": 0}


class Decoding:
    """From text and random logits to answers."""

    def __init__(self) -> None:
        self.tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
        self.maker = WindowMaker(self.tokenizer, max_seq_len=48, max_question_tokens=8, overlap=8, buckets=(32, 48))

    def examine(self, data: bytes) -> None:
        counts["inputs"] += 1
        given = atheris.FuzzedDataProvider(data)
        overlap = given.ConsumeIntInRange(-1, 50)
        max_seq_len = given.ConsumeIntInRange(4, 49)
        top_k, max_answer_tokens = given.ConsumeIntInRange(1, 30), given.ConsumeIntInRange(1, 40)
        words, seed = given.ConsumeBool(), given.ConsumeIntInRange(0, 255)
        question = given.ConsumeUnicode(given.ConsumeIntInRange(0, 20))
        contexts = [given.ConsumeUnicode(given.ConsumeIntInRange(0, 200)) for _ in range(given.ConsumeIntInRange(1, 3))]
        wanted = None if overlap < 0 else overlap
        documents = []
        for context in contexts:
            try:
                windows = self.maker(question, context, overlap=wanted, max_seq_len=max_seq_len)
            except ValueError as error:
                if not str(error).startswith(("question: ", "context: ", "overlap: ", "max_seq_len: ")):
                    raise
                counts["refused"] += 1
                return
            check_windows(windows, max_seq_len=max_seq_len, overlap=wanted, buckets=self.maker.buckets)
            check_tokens_are_where_they_say(windows, self.tokenizer)
            documents.append(windows)
        random = np.random.default_rng(seed)
        logits: list[list[Logits]] = []
        for windows in documents:
            pairs = (random.normal(scale=6, size=(2, 1, w.length)).astype(np.float32) for w in windows.windows)
            logits.append([(start, end) for start, end in pairs])
        decoded = check_decoded(documents, logits, top_k=top_k, max_answer_tokens=max_answer_tokens, words=words)
        for answer in decoded.answers:
            context = contexts[answer.context_index]
            for unit in get_args(OffsetUnit):
                start, end = offset_in(context, answer.start, unit), offset_in(context, answer.end, unit)
                assert cut(context, start, end, unit) == answer.text


def examine_graphemes(data: bytes) -> None:
    """Spans widened to clusters are those of an independent implementation."""
    counts["inputs"] += 1
    given = atheris.FuzzedDataProvider(data)
    places = given.ConsumeIntInRange(0, 400), given.ConsumeIntInRange(0, 400)
    text = "".join(filter(of_either_unicode, given.ConsumeUnicodeNoSurrogates(200)))
    if not text:
        counts["refused"] += 1
        return
    start, end = sorted(place % (len(text) + 1) for place in places)
    found = snap_to_graphemes(text, start, end)
    if start == end:
        assert found == (start, end)
        return
    bounds = cluster_bounds(text)
    assert found == (max(b for b in bounds if b <= start), min(b for b in bounds if b >= end)), (text, start, end)


def main(count: int, seed: int) -> None:
    """Three inputs in four go to `Decoding`, the others to the clusters."""
    decoding = Decoding()

    def examine(data: bytes) -> None:
        if data[:1] < b"\xc0":
            decoding.examine(data[1:])
        else:
            examine_graphemes(data[1:])
        if counts["inputs"] == count:
            print(json.dumps(counts), flush=True)

    atheris.Setup(
        [sys.argv[0], f"-atheris_runs={count}", f"-seed={seed + 1}", "-max_len=1200", "-verbosity=0"], examine
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
