"""Coverage-guided fuzzing of windows, spans and graphemes: ``python -m tests.chaos.fuzz_decoding COUNT SEED``.

It is a separate program, because libFuzzer takes over the process. It needs atheris, which does not have wheels for
every Python: see the group ``fuzz`` in pyproject.toml. The last output line is JSON: the number of inputs, and of
refused ones.
"""

import json
import sys

import atheris

with atheris.instrument_imports(include=["bertqa.windows", "bertqa.spans", "bertqa.graphemes"]):
    from tests.support.decoding_cases import Case, check_case, check_snapping

counts = {"inputs": 0, "refused": 0}


def decoding(data: bytes) -> bool:
    """Make a case from bytes."""
    given = atheris.FuzzedDataProvider(data)
    overlap = given.ConsumeIntInRange(-1, 50)
    case = Case(
        overlap=None if overlap < 0 else overlap,
        max_seq_len=given.ConsumeIntInRange(4, 49),
        top_k=given.ConsumeIntInRange(1, 30),
        max_answer_tokens=given.ConsumeIntInRange(1, 40),
        words=given.ConsumeBool(),
        seed=given.ConsumeIntInRange(0, 255),
        question=given.ConsumeUnicode(given.ConsumeIntInRange(0, 20)),
        contexts=tuple(
            given.ConsumeUnicode(given.ConsumeIntInRange(0, 200)) for _ in range(given.ConsumeIntInRange(1, 3))
        ),
    )
    return check_case(case)


def snapping(data: bytes) -> bool:
    """Make two positions in a text from bytes."""
    given = atheris.FuzzedDataProvider(data)
    places = given.ConsumeIntInRange(0, 400), given.ConsumeIntInRange(0, 400)
    return check_snapping(given.ConsumeUnicodeNoSurrogates(200), places)


def main(count: int, seed: int) -> None:
    """Decode three of four inputs; use the others for grapheme clusters."""

    def examine(data: bytes) -> None:
        counts["inputs"] += 1
        kept = decoding(data[1:]) if data[:1] < b"\xc0" else snapping(data[1:])
        counts["refused"] += not kept
        if counts["inputs"] == count:
            print(json.dumps(counts), flush=True)

    atheris.Setup(
        [sys.argv[0], f"-atheris_runs={count}", f"-seed={seed + 1}", "-max_len=1200", "-verbosity=0"], examine
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
