"""What `measure_service` counts of a load, and what it takes for a broken service."""

import json

import pytest

from loadtest.closed_loop import Load, Reply
from loadtest.measure_service import Row, check
from loadtest.tables import heading, markdown, row


def answer(infer_ms: float) -> bytes:
    timings = {"infer_ms": infer_ms}
    return json.dumps({"answers": [{"text": "Uber"}], "timings": timings, "windows": 1}).encode()


def test_what_ends_after_the_measured_time_counts_for_cpu_time_alone() -> None:
    load = Load(
        [
            Reply(0, 1.2, 200, answer(100), 1, 0.2, 1.2),  # was refused once before
            Reply(1, 0.4, 200, answer(300), 0, 0.4, 1.6),
            Reply(2, 0.01, 503, b"{}", 0, 0.01, 1.7),
            Reply(3, 3.0, 200, answer(900), 2, 3.0, 3.0),  # too late
        ]
    )
    found = Row(2, 2.0, load, cpu_s=0.03)
    assert found.answered == [0.2, 0.4]
    assert found.refused == [0.01]
    assert found.refusals == 2
    assert found.rate == 1.0
    assert found.ms(50) == pytest.approx(300)
    assert found.stage("infer_ms") == 200
    assert found.cpu_ms == pytest.approx(10)


@pytest.mark.parametrize(("status", "body"), [(500, b"{}"), (0, b"ConnectionResetError()"), (200, b'{"answers": []}')])
def test_a_reply_that_is_neither_answer_nor_refusal_ends_the_measurement(status: int, body: bytes) -> None:
    check(Load([Reply(0, 0.1, 200, answer(1), 0), Reply(0, 0.1, 503, b"{}", 0)]))
    with pytest.raises(RuntimeError, match=f"status {status}"):
        check(Load([Reply(0, 0.1, 200, answer(1), 0), Reply(1, 0.1, status, body, 0)]))


def test_tables_are_markdown() -> None:
    assert heading(["name", "a", "b"]) == "| name | a | b |\n|---|---:|---:|"
    assert row(["x", 1, 2.5]) == "| x | 1 | 2.5 |"
    assert markdown([{"a": 1, "b": 2}, {"a": 3, "b": 4}]) == "| a | b |\n|---:|---:|\n| 1 | 2 |\n| 3 | 4 |\n"
    assert markdown([]) == ""
