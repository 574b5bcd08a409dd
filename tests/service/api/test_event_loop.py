"""Test that parsing a body or writing a reply never blocks the event loop, whatever the content.

The tests measure the CPU time of the process between two turns of the loop, which other processes do not change; each
case prints it.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import httpx
import pytest

from bertqa.spans import Answer, Decoded
from service.app import create_app
from service.inference.pipeline import Pipeline
from service.inference.question import Question, Result
from service.settings import Settings
from tests.support.asking import ASKED
from tests.support.toy_model import FakeEngine, toy_bundle

pytestmark = pytest.mark.alone  # a hold is measured in milliseconds

SIZE = 2 << 20
LONGEST_S = 0.1
"""Twice what the service promises, for slower processors than those that it was measured on."""


async def longest_turn(calls: Sequence[tuple[str, bytes]]) -> tuple[float, list[httpx.Response]]:
    """Send bodies to the application; returns the longest turn of the event loop meanwhile, and the replies."""
    bundle = toy_bundle()
    app = create_app(Settings(), engine=FakeEngine(bundle.manifest.identity), bundle=bundle)
    longest = 0.0

    async def tick() -> None:
        nonlocal longest
        while True:
            started = time.process_time()
            await asyncio.sleep(0)
            await asyncio.sleep(0.0005)
            longest = max(longest, time.process_time() - started)

    client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x", timeout=60)
    async with app.router.lifespan_context(app), client:
        await client.post("/v1/answer", json=ASKED)  # what happens once
        ticking = asyncio.create_task(tick())
        await asyncio.sleep(0.01)
        longest = 0.0
        headers = {"content-type": "application/json"}
        replies = [await client.post(path, content=body, headers=headers) for path, body in calls]
        await asyncio.sleep(0.01)
        ticking.cancel()
    return longest, replies


def filled(piece: bytes) -> bytes:
    return b"[" + piece * ((SIZE - 80) // len(piece)) + piece.rstrip(b",") + b"]"


def text(piece: str) -> bytes:
    return b'{"context": "%b"}' % (piece * ((SIZE - 20) // len(piece.encode()))).encode()


BODIES = {
    "objects": (filled(b"{},"), 400),
    "lists": (filled(b"[],"), 400),
    "nested pairs": (filled(b'{"a":[1]},'), 400),
    "numbers": (filled(b"1,"), 400),
    "strings": (filled(b'"",'), 400),
    "names": (b'{"questions": ' + filled(b'{"question":"","context":"","top_k":1},') + b"}", 400),
    "escaped quotes": (filled(b'"\\"",'), 400),
    "digits": (b"9" * SIZE, 400),
    "fraction": (b'{"top_k": 0.' + b"3" * (SIZE - 20) + b"}", 422),
    "exponent": (b'{"top_k": ' + b"1" * (SIZE - 30) + b"e-2097100}", 422),
    "depth": (b"[" * SIZE, 400),
    "depth that can be parsed": (b'{"context": ' + b"[" * 900 + b"]" * 900 + b"}", 422),
    "braces in a text": (text("[{},{}],"), 422),
    "quotes in a text": (text('\\"'), 422),
    "backslashes in a text": (text("\\\\"), 422),
    "escapes in a text": (text("\\u00e9"), 422),
    "wide text": (text("x") + b" ", 422),
    "one emoji": (text("x").replace(b"x", "😀".encode(), 1), 422),
    "hangul": (text("가"), 422),
    "spaces": (b" " * SIZE, 400),
    "64 questions of 64 contexts": (
        json.dumps(
            {"questions": [{"question": "?" * 1001, "contexts": ["[{}]" * 110] * 64, "model": None}] * 64}
        ).encode(),
        422,
    ),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_body_within_the_limit_holds_up_nobody(name: str) -> None:
    body, status = BODIES[name]
    assert len(body) <= SIZE
    longest, replies = asyncio.run(longest_turn([("/v1/answers" if b"questions" in body else "/v1/answer", body)]))
    print(f"{name}: {longest * 1000:.1f} ms")
    assert replies[0].status_code == status, replies[0].text[:200]
    if status == 400 and name not in ("digits", "depth", "spaces"):
        assert "at most 20,000 values in all its lists and objects" in replies[0].json()["error"]
    assert longest < LONGEST_S


@pytest.mark.parametrize("path", ["/v1/answers", "/predict"])
def test_a_large_reply_holds_up_nobody(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    span = "é" * 5_000

    async def found(self: Pipeline, questions: Sequence[Question], *, deadline: float) -> list[Result]:
        (first,) = await answer(self, questions[:1], deadline=deadline)
        answers = tuple(Answer(span + str(n), 0.005, 0, 5_000, 0) for n in range(100))
        decoded = Decoded(answers, True, first.decoded.null_score, first.decoded.null_margin)
        return [replace(first, decoded=decoded) for _ in questions]

    answer: Any = Pipeline.answer
    monkeypatch.setattr(Pipeline, "answer", found)
    asked: dict[str, Any] = {"question": "Who?", "context": "é" * 6_000}
    many = (
        {"questions": [{**asked, "offset_unit": "utf16"}] * 64}
        if path == "/v1/answers"
        else {"instances": [asked] * 64, "parameters": {"top_k": 100}}
    )
    longest, replies = asyncio.run(longest_turn([(path, json.dumps(many, ensure_ascii=False).encode())]))
    print(f"{path}: {longest * 1000:.1f} ms for {len(replies[0].content):,} bytes")
    assert replies[0].status_code == 200
    assert len(replies[0].json()["results" if path == "/v1/answers" else "predictions"]) == 64
    assert longest < 1.5 * LONGEST_S  # the pieces of 64 MB are joined in one call
