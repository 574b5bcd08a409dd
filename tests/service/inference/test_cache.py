"""Test cached answers and shared computations, in the cache alone and in the application."""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from service.inference.registry import ServedModel
from service.inference.shared_values import SharedValues
from service.settings import Settings
from service.triton.errors import EngineUnavailable
from tests.support.paths import ROOT
from tests.support.servers import serving
from tests.support.toy_model import FakeEngine

ASKED = {"question": "Who?", "context": "It was made at «Uber» in 2017."}
MakeApp = Callable[..., FastAPI]


def soon(seconds: float = 30.0) -> float:
    return time.monotonic() + seconds


def play(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 30))


class Work:
    """A computation that ends when it is let."""

    def __init__(self, value: object = "value") -> None:
        self.value, self.begun, self.cancelled = value, 0, 0
        self.let = asyncio.Event()

    async def __call__(self) -> Any:
        self.begun += 1
        try:
            await self.let.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_the_oldest_goes_when_bytes_run_out_and_what_is_too_large_is_not_kept() -> None:
    async def scenario() -> None:
        cache = SharedValues[str](10, len)

        async def get(key: str, value: str) -> str:
            async def compute() -> str:
                return value

            return (await cache.get(key, compute, deadline=soon()))[1]

        assert [await get(key, "1234") for key in "abab"] == ["miss", "miss", "hit", "hit"]
        assert (len(cache), cache.bytes) == (2, 8)
        assert await get("a", "") == "hit"
        assert await get("c", "1234") == "miss"
        assert [await get(key, "") for key in "ac"] == ["hit", "hit"], "b was not asked for longest"
        assert await get("large", "12345678901") == await get("large", "12345678901") == "miss"
        assert (len(cache), cache.bytes) == (2, 8)

    play(scenario)


def test_one_computation_for_all_who_ask_meanwhile_and_one_who_leaves_ends_it_for_nobody() -> None:
    async def scenario() -> None:
        cache, work = SharedValues[str](10, len), Work()
        first, second, third = (asyncio.ensure_future(cache.get("k", work, deadline=soon())) for _ in range(3))
        await settle()
        first.cancel()
        await settle()
        assert (work.begun, work.cancelled, first.cancelled()) == (1, 0, True)
        work.let.set()
        assert await second == await third == ("value", "coalesced")
        assert await cache.get("k", work, deadline=soon()) == ("value", "hit")

    play(scenario)


def test_the_last_who_leaves_ends_it_and_the_next_begins_anew() -> None:
    async def scenario() -> None:
        cache, work = SharedValues[str](10, len), Work()
        waiting = [asyncio.ensure_future(cache.get("k", work, deadline=soon())) for _ in range(2)]
        await settle()
        for each in waiting:
            each.cancel()
        late = asyncio.ensure_future(cache.get("k", work, deadline=soon()))
        await settle()
        work.let.set()
        assert (await late)[0] == "value"
        await settle()
        assert not cache._flights

    play(scenario)


def test_errors_are_shared_but_not_kept() -> None:
    async def scenario() -> None:
        cache, work = SharedValues[str](10, len), Work(EngineUnavailable("gone"))
        waiting = [asyncio.ensure_future(cache.get("k", work, deadline=soon())) for _ in range(2)]
        await settle()
        work.let.set()
        for each in waiting:
            with pytest.raises(EngineUnavailable):
                await each
        work.value = "value"
        assert await cache.get("k", work, deadline=soon()) == ("value", "miss")
        assert work.begun == 2

    play(scenario)


def test_everyone_has_a_deadline_of_his_own() -> None:
    async def scenario() -> None:
        cache, work = SharedValues[str](10, len), Work()
        patient = asyncio.ensure_future(cache.get("k", work, deadline=soon()))
        await settle()
        with pytest.raises(TimeoutError):
            await cache.get("k", work, deadline=soon(0.01))
        assert not patient.done()
        patient.cancel()
        await asyncio.wait([patient])
        # one whose own time is up fails, and whoever joined it tries again
        hasty = Work(TimeoutError())
        first = asyncio.ensure_future(cache.get("k", hasty, deadline=soon(-1)))
        await settle()
        second = asyncio.ensure_future(cache.get("k", work, deadline=soon()))
        await settle()
        hasty.let.set()
        work.let.set()
        with pytest.raises(TimeoutError):
            await first
        assert await second == ("value", "miss")

    play(scenario)


def test_the_same_question_is_computed_once(make_app: MakeApp, engine: FakeEngine) -> None:
    app = make_app(cache_mb=1)
    with serving(app) as url, httpx.Client(base_url=url, trust_env=False) as client:
        first, again = (client.post("/v1/answer", json=ASKED) for _ in range(2))
        assert [reply.headers["cache-status"] for reply in (first, again)] == [
            "bertqa; fwd=miss; stored",
            "bertqa; hit",
        ]
        assert engine.windows == 1
        assert again.json()["answers"] == first.json()["answers"]
        assert again.json()["timings"]["infer_ms"] == 0
        # what only the reply's form depends on is no other question
        told = client.post("/v1/answer", json={**ASKED, "offset_unit": "byte", "explain": True}).json()
        assert (told["answers"][0]["start"], len(told["explain"]["windows"]), engine.windows) == (17, 1, 1)
        others: list[dict[str, Any]] = [
            {"top_k": 2},
            {"max_answer_tokens": 5},
            {"overlap": 3},
            {"question": "Where?"},
            {"context": "«Uber»"},
        ]
        for number, other in enumerate(others):
            client.post("/v1/answer", json=ASKED | other)
            assert engine.windows == number + 2
        hugging_face = client.post("/", json={"inputs": ASKED})  # other defaults
        assert hugging_face.headers["cache-status"].endswith("stored")
        told = client.get("/metrics").text
        assert 'bertqa_cache_lookups_total{source="hit"} 2.0' in told
        assert "bertqa_cache_entries 7.0" in told
        served: ServedModel = app.state.services.pipeline.registry[None]
        assert served.cache is not None
        assert f"bertqa_cache_bytes {float(served.cache.bytes)}" in told
        # an engine that is busy has no part in what is known
        served.admission.call_s = 9.0
        busy = ExitStack()
        for _ in range(64):
            busy.enter_context(served.admission.arriving())
        assert client.post("/v1/answer", json=ASKED).status_code == 200
        new = [{**ASKED, "question": question} for question in ("When?", "Why?")]
        assert client.post("/v1/answer", json=new[0]).status_code == 503
        refused = client.post("/v1/answers", json={"questions": new})
        assert refused.status_code == 503
        assert "the limit is 2.00 s" in refused.json()["error"], "at once, not after it has waited"
        assert client.post("/v1/answers", json={"questions": [ASKED, new[0]]}).status_code == 503
        busy.close()


def test_a_client_that_leaves_does_not_end_what_another_waits_for(make_app: MakeApp, engine: FakeEngine) -> None:
    engine.delay_s = 0.5

    async def scenario(url: str) -> None:
        async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=30) as client:
            leaving = asyncio.ensure_future(client.post("/v1/answer", json=ASKED, timeout=0.2))
            while not engine.started.is_set():
                await asyncio.sleep(0.01)
            staying = asyncio.ensure_future(client.post("/v1/answer", json=ASKED))
            with pytest.raises(httpx.ReadTimeout):
                await leaving
            reply = await staying
            assert (reply.status_code, reply.headers["cache-status"]) == (200, "bertqa; fwd=miss; collapsed")
            assert engine.windows == 1
            assert not engine.cancelled.is_set()

    with serving(make_app(cache_mb=1)) as url:
        asyncio.run(scenario(url))


def test_errors_and_other_versions_are_not_answered_from_memory(make_app: MakeApp, engine: FakeEngine) -> None:
    app = make_app(cache_mb=1)
    with serving(app) as url, httpx.Client(base_url=url, trust_env=False) as client:
        engine.failure = EngineUnavailable("gone")
        assert client.post("/v1/answer", json=ASKED).status_code == 503
        engine.failure = None
        for _ in range(2):
            assert client.post("/v1/answer", json=ASKED).status_code == 200
        models = app.state.services.pipeline.registry
        models.put(ServedModel(models[None].bundle, engine, app.state.services.metrics, Settings()))  # a new one
        assert client.post("/v1/answer", json=ASKED).headers["cache-status"] == "bertqa; fwd=miss; stored"
        assert engine.windows == 2


def test_without_a_cache_nothing_is_kept(client: httpx.Client, engine: FakeEngine) -> None:
    for number in (1, 2):
        assert "cache-status" not in client.post("/v1/answer", json=ASKED).headers
        assert engine.windows == number


def test_a_batch_computes_what_stands_in_it_twice_once_and_what_is_known_not_at_all(
    make_app: MakeApp, engine: FakeEngine
) -> None:
    other = {**ASKED, "question": "Where?"}
    with serving(make_app(cache_mb=1)) as url, httpx.Client(base_url=url, trust_env=False) as client:

        def ask(*questions: dict[str, str]) -> tuple[str, list[Any]]:
            reply = client.post("/v1/answers", json={"questions": questions})
            assert reply.status_code == 200, reply.text
            return reply.headers["cache-status"], [each["answers"] for each in reply.json()["results"]]

        status, (first, second, third) = ask(ASKED, other, ASKED)
        assert (status, engine.windows) == ("bertqa; fwd=miss; stored", 2)
        assert first == third == client.post("/v1/answer", json=ASKED).json()["answers"]
        assert second == client.post("/v1/answer", json=other).json()["answers"]
        assert ask(other, ASKED) == ("bertqa; hit", [second, first])
        assert ask(ASKED, {**ASKED, "question": "When?"})[0] == "bertqa; fwd=miss; stored"
        assert engine.windows == 3
        told = client.get("/metrics").text
        for source, count in (("miss", 3), ("coalesced", 1), ("hit", 5)):
            assert f'bertqa_cache_lookups_total{{source="{source}"}} {count}.0' in told


def test_batches_join_what_is_being_computed_and_a_bad_question_is_named_by_its_place(
    make_app: MakeApp, engine: FakeEngine
) -> None:
    engine.delay_s = 0.5
    bad = {**ASKED, "question": "\x00"}  # found out by the tokenizer alone

    async def scenario(url: str) -> None:
        async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=30) as client:

            async def ask(*questions: dict[str, str]) -> httpx.Response:
                return await client.post("/v1/answers", json={"questions": questions})

            reply = await ask(ASKED, {**ASKED, "question": "Where?"}, bad)
            assert (reply.status_code, engine.windows) == (422, 0)
            assert reply.json()["error"] == "questions[2].question: contains no token that the model knows"
            alone = asyncio.ensure_future(client.post("/v1/answer", json=ASKED))
            while not engine.started.is_set():
                await asyncio.sleep(0.01)
            reply = await ask(bad, ASKED)
            assert (reply.status_code, reply.json()["error"][:22]) == (422, "questions[0].question:")
            assert not engine.cancelled.is_set(), "the one that waits alone still wants it"
            batches = await asyncio.gather(ask(ASKED), ask(ASKED, ASKED), ask({**ASKED, "question": "Where?"}, ASKED))
            statuses = [reply.headers["cache-status"].removeprefix("bertqa; fwd=miss; ") for reply in batches]
            assert statuses == ["collapsed", "collapsed", "stored"]
            assert (await alone).status_code == 200
            assert engine.windows == 2

    app = make_app(cache_mb=1)
    with serving(app) as url:
        asyncio.run(scenario(url))
    assert app.state.services.pipeline.memory.held == app.state.services.pipeline.registry[None].admission.busy == 0


_FILL = """
import asyncio, json, resource, sys, time
from tests.support.toy_model import FakeEngine, toy_bundle
from service.inference.cache import CachedPipeline
from service.inference.pipeline import Pipeline
from service.observability.metrics import Metrics
from service.inference.registry import ModelRegistry, ServedModel
from service.inference.question import Question
from service.settings import Settings

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

async def fill(context, top_k):
    bundle, settings, metrics = toy_bundle(), Settings(cache_mb=24, max_wait_s=60), Metrics()
    served = ServedModel(bundle, FakeEngine(bundle.manifest.identity), metrics, settings)
    pipeline = Pipeline(ModelRegistry(bundle.model, {bundle.model: served}), settings, metrics)
    cached = CachedPipeline(pipeline, settings.cache_mb << 20, metrics)
    async def ask(number):
        question = Question(model=served, question=f"who {number}", contexts=(f"{number} {context}",), top_k=top_k)
        await cached.answer([question], deadline=time.monotonic() + 60)
    for number in range(3):
        await ask(number)
    began, before = resident(), served.cache.bytes
    while served.cache.bytes < 20 << 20:
        number += 1
        await ask(number)
    print((resident() - began) / (served.cache.bytes - before), len(served.cache))
    pipeline.close()

asyncio.run(fill(*json.loads(sys.argv[1])))
"""


@pytest.mark.parametrize(
    ("context", "top_k"),
    [("It was made at «Uber» in 2017.", 1), ("word " * 200, 20), ((" " * 2_000).join("abcdefghijklmn"), 100)],
    ids=["short", "windows", "answers"],
)
def test_a_cache_takes_no_more_memory_than_it_says(context: str, top_k: int) -> None:
    command = [sys.executable, "-c", _FILL, json.dumps([context, top_k])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    share, entries = done.stdout.split()
    assert int(entries) > 10
    assert 0.3 < float(share) < 1.25, done.stdout
