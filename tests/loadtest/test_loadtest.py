"""Test the load tests: the requests and their timing, the rating of replies, the reports, and small runs on the toy."""

import asyncio
import csv
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats  # type: ignore[import-untyped]

from bertqa.cli.command import parse
from bertqa.manifest import Bundle
from bertqa.repository import Repository
from bertqa.squad import Example, Reference, as_squad, read_squad
from bertqa.windows import WindowTokenizer
from loadtest import figures, report, servers, sweep
from loadtest.closed_loop import closed_loop, http_post
from loadtest.commands import SweepOptions
from loadtest.points import KNEE, STAGES, Load, Point, knee, read_samples, summarize
from loadtest.replies import RIGHT, Sample, judge
from loadtest.workload import (
    LONG_CHARS,
    SEVERAL,
    Answer,
    Asked,
    Draw,
    Kind,
    due_times,
    make_requests,
    mark,
    parse_mix,
    read_requests,
    write_requests,
    zipf_shares,
)
from service.api_keys import new_key
from tests.support.paths import CHECKPOINT
from tests.support.repositories import publish_toy_bundle
from tests.support.servers import serving

KINDS: tuple[Kind, ...] = ("short", "long", "several")


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return read_squad(CHECKPOINT / "gate.json")


def toy_examples() -> list[Example]:
    places = ("Uber", "horovod", "who", "where")
    texts = [f"Horovod {n} was made at « {place} » ." for n in range(3) for place in places]
    return [
        Example(str(n), "toy", "where was horovod made ?", text, (Reference("Horovod", 0),))
        for n, text in enumerate(texts)
    ]


# What is asked


@pytest.mark.parametrize("kind", KINDS)
def test_requests_ask_a_question_of_texts_with_its_own_paragraph(kind: Kind, examples: list[Example]) -> None:
    asked = make_requests(examples, kind, 60)
    assert asked == make_requests(examples, kind, 60)
    assert asked != make_requests(examples, kind, 60, seed=1)
    own = {example.question: example.context for example in examples}
    for each in asked:
        assert each.kind == kind
        assert own[each.question] in "\n\n".join(each.contexts)
    lengths = [sum(map(len, each.contexts)) for each in asked]
    if kind == "long":
        assert all(len(each.contexts) == 1 for each in asked)
        assert max(lengths) <= LONG_CHARS[1]
        assert min(lengths) < 5_000
        assert max(lengths) > 50_000
    if kind == "several":
        assert {len(each.contexts) for each in asked} == set(range(SEVERAL[0], SEVERAL[1] + 1))


def test_requests_come_again_when_there_are_fewer_questions() -> None:
    assert Counter(each.contexts for each in make_requests(toy_examples(), "short", 36)).most_common()[-1][1] == 3


@given(st.integers(0, 4**24 - 1), st.integers(0, 4**24 - 1))
def test_a_mark_is_white_space_that_tells_numbers_apart(one: int, other: int) -> None:
    assert mark(one).isspace()
    assert (mark(one) == mark(other)) == (one == other)


def test_a_mark_changes_no_token(examples: list[Example]) -> None:
    tokenizer = WindowTokenizer.from_directory(CHECKPOINT)
    for example in examples[:20]:
        plain, marked = (tokenizer(example.question, example.context + end) for end in ("", mark(123_456_789)))
        for one, other in zip(plain.windows, marked.windows, strict=True):
            np.testing.assert_equal(one.tensors(), other.tensors())


def test_unique_requests_never_come_again() -> None:
    asked = [each for kind in KINDS for each in make_requests(toy_examples(), kind, 12)]
    weights: dict[Kind, float] = {"short": 8, "several": 2}
    drawn = list(islice(Draw(asked, weights, "unique", seed=0), 4_000))
    assert len({body for _, body in drawn}) == 4_000
    kinds = Counter(each.kind for each, _ in drawn)
    assert stats.chisquare([kinds["short"], kinds["several"]], [3_200, 800]).pvalue > 1e-4
    each, body = drawn[0]
    texts = json.loads(body)
    texts = texts.get("contexts") or [texts["context"]]
    assert [text.rstrip() for text in texts] == [text.rstrip() for text in each.contexts]


def test_two_runs_ask_nothing_that_the_other_asked() -> None:
    asked = make_requests(toy_examples(), "short", 12)
    one, other = ({body for _, body in islice(Draw(asked, {"short": 1}, "unique", 0), 500)} for _ in range(2))
    assert not one & other


def test_zipf_draws_by_rank() -> None:
    asked = make_requests(toy_examples(), "short", 12)
    drawn = Counter(each.contexts for each, _ in islice(Draw(asked, {"short": 1}, "zipf", seed=3), 20_000))
    expected = np.array([1 / rank for rank in range(1, 13)])
    expected *= 20_000 / expected.sum()
    assert stats.chisquare([drawn[each.contexts] for each in asked], expected).pvalue > 1e-4


@given(st.integers(1, 2_000))
def test_zipf_shares_rise_to_one(count: int) -> None:
    shares = zipf_shares(count)
    assert len(shares) == count
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_a_kind_without_requests_is_refused() -> None:
    with pytest.raises(ValueError, match="no request of the kind long"):
        Draw(make_requests(toy_examples(), "short", 3), {"short": 1, "long": 1}, "unique", 0)


def test_a_mix_is_read() -> None:
    assert parse_mix("short=8, long=1,several") == {"short": 8, "long": 1, "several": 1}
    for wrong in ("shrot=1", "short=0", "short=-1,long=2", ""):
        with pytest.raises(ValueError, match=r"is none of|must be positive"):
            parse_mix(wrong)


def test_requests_are_read_as_they_were_written(tmp_path: Path) -> None:
    asked = [each for kind in KINDS for each in make_requests(toy_examples(), kind, 4)]
    asked[0] = replace(asked[0], answer=Answer("Uber", 3, 7))
    write_requests(tmp_path / "requests.jsonl", asked)
    assert read_requests(tmp_path / "requests.jsonl") == asked


# When


def test_arrivals_are_a_poisson_process() -> None:
    due = np.array(list(islice(due_times(50, seed=1), 20_000)))
    assert stats.kstest(np.diff(due, prepend=0), stats.expon(scale=1 / 50).cdf).pvalue > 1e-4
    counts = np.histogram(due, bins=np.arange(0, int(due[-1])))[0]
    assert counts.var() / counts.mean() == pytest.approx(1, abs=0.25)


def test_arrivals_of_several_processes_add_up() -> None:
    merged = sorted(time for seed in range(4) for time in islice(due_times(25, seed), 5_000))
    gaps = np.diff(merged[:15_000], prepend=0)
    assert stats.kstest(gaps, stats.expon(scale=1 / 100).cdf).pvalue > 1e-4


# What a reply is worth

ASKED = Asked("several", "where?", ("At Uber.", "In London."), Answer("London", 3, 9, 1))


def reply(*answers: tuple[str, int, int, int]) -> bytes:
    names = ("text", "start", "end", "context_index")
    return json.dumps({"answers": [dict(zip(names, each, strict=True)) for each in answers]}).encode()


@pytest.mark.parametrize(
    ("status", "headers", "body", "outcome"),
    [
        (200, {}, reply(("London", 3, 9, 1)), RIGHT),
        (200, {}, reply(("London", 3, 9, 1), ("Uber", 3, 7, 0)), RIGHT),
        (200, {}, reply(("Uber", 3, 7, 0)), "wrong another answer than the undisturbed service gave"),
        (200, {}, reply(("London", 2, 8, 1)), "wrong not a piece of its text"),
        (200, {}, reply(("London", 3, 9, 1), ("Paris", 0, 5, 0)), "wrong not a piece of its text"),
        (200, {}, reply(("London", 3, 9, 2)), "wrong not an answer"),
        (200, {}, reply(), "wrong empty"),
        (200, {}, reply(("", 3, 3, 1)), "wrong empty"),
        (200, {}, b'{"answers": null}', "wrong not an answer"),
        (200, {}, b"London", "wrong 200 not a JSON object"),
        (503, {"retry-after": "1"}, b'{"error_type": "engine_overloaded"}', "shed 503 engine_overloaded"),
        (429, {"retry-after": "1"}, b'{"error_type": "overloaded"}', "shed 429 overloaded"),
        (503, {}, b'{"error_type": "engine_broken"}', "error 503 engine_broken"),
        (504, {"retry-after": "1"}, b'{"error_type": "engine_timeout"}', "error 504 engine_timeout"),
        (502, {}, b"<html>", "error 502 not a JSON object"),
        (0, {}, b"timed out", "error no reply: timed out"),
    ],
)
def test_every_reply_gets_its_verdict(status: int, headers: dict[str, str], body: bytes, outcome: str) -> None:
    assert judge(ASKED, status, headers, body)[0] == outcome


def test_without_a_known_answer_a_piece_of_the_text_is_right() -> None:
    assert judge(replace(ASKED, answer=None), 200, {}, reply(("Uber", 3, 7, 0)))[0] == RIGHT


# What is made of it


@given(st.floats(1, 100), st.floats(0.001, 1))
def test_the_knee_of_a_server_that_saturates(capacity: float, latency: float) -> None:
    """Throughput rises as clients / latency until the capacity; the knee is where it has come to 95 % of that."""
    clients = [2**n for n in range(12)]
    curve = {each: min(each / latency, capacity) for each in clients}
    peak = max(curve.values())
    assert knee(curve) == next(each for each in clients if each / latency >= KNEE * peak)


def test_the_knee_of_other_curves() -> None:
    falls = {n: n / (1 + 0.1 * (n - 1) + 0.01 * n * (n - 1)) for n in (1, 2, 4, 8, 16, 32, 64)}  # Gunther's law
    assert knee(falls) == 8
    assert knee({1: 10, 2: 20, 4: 40, 8: 80}) == 8
    assert knee({4: 100.0, 1: 99.0}) == 1
    assert knee({7: 0.0}) == 7
    with pytest.raises(ValueError, match="empty"):
        knee({})


def result(samples: list[Sample], began: float = 1_000.0, seconds: float = 4.0) -> dict[str, Any]:
    return {"began": began, "seconds": seconds, "cpu_s": 1.0, "fields": Sample._fields, "samples": samples}


def point(load: Load, samples: list[Sample], **engine: float) -> Point:
    return summarize(
        load,
        json.loads(json.dumps(result(samples))),
        cpu_s={"service": 2.0, "triton": 4.0, "clients": 1.0},
        engine=engine,
        memory_mib={"service": 100.0, "triton": 500.0},
        date="2026-01-01T00:00:00+00:00",
        commit="0123456789",
    )


def test_a_run_is_summed_up() -> None:
    # windows, tokenize, infer, decode, total
    stages = (1, 1.0, 80.0, 1.0, 90.0)
    steady = [Sample(1_000 + n / 50, 1_000 + n / 50, 1_000.11 + n / 50, "short", RIGHT, *stages) for n in range(200)]
    warmup = [
        Sample(999.0, 999.0, 999.2, "short", RIGHT, *stages),
        Sample(999.5, 999.5, 999.6, "short", "error 504 late"),
    ]
    late = [Sample(1_003.9, 1_003.95, 1_009.9, "short", RIGHT, *stages)]  # due in time, answered after the end
    others = [
        Sample(1_001, 1_001, 1_001, "short", "shed 503 engine_overloaded"),
        Sample(1, 1, 1, "short", "wrong empty"),
    ]
    load = Load(phase="closed", clients=5)
    found = point(load, warmup + steady + late + others, calls=202, queue_s=202 * 0.005, compute_s=202 * 0.07)
    assert found.load == load
    assert found.throughput == pytest.approx(195 / 4)  # the last five came after the end
    assert (found.throughput_low, found.throughput_high) == pytest.approx((45, 50), abs=1)
    assert found.p50_ms == pytest.approx(110)
    assert found.max_ms == pytest.approx(6_000)
    assert (found.right, found.shed, found.wrong, found.error) == (202, 1, 1, 1)
    assert found.outcomes["wrong empty"] == 1
    assert found.kinds["short"]["requests"] == 201
    assert found.cpu_service_ms == pytest.approx(2_000 / 202)
    assert (found.queue_ms, found.compute_ms) == pytest.approx((5, 70))
    assert found.line_ms == pytest.approx(80 - 75)
    mean_ms = (200 * 110 + 6_000 + 200) / 202
    assert sum(getattr(found, stage) for stage in STAGES) == pytest.approx(mean_ms - 90 + 82)
    assert found.http_ms == pytest.approx(mean_ms - 90)


def test_what_too_few_replies_cannot_tell_is_not_told() -> None:
    few = point(Load(phase="closed"), [Sample(1_000, 1_000, 1_001, "long", RIGHT, 9) for _ in range(19)], calls=19)
    assert few.p50_ms == 1_000
    assert math.isnan(few.p95_ms)
    assert math.isnan(few.line_ms)  # several windows side by side
    nothing = point(Load(phase="closed"), [])
    assert nothing.throughput == 0
    assert math.isnan(nothing.p50_ms)
    assert math.isnan(nothing.cpu_service_ms)


def all_points() -> list[Point]:
    points = []
    for load in sweep.plan(parse(SweepOptions, [])):
        clients = load.clients or 10
        latency = max(0.02, clients / (100 * load.tritons))
        samples = [
            Sample(1_000 + n / 50, 1_000 + n / 50, 1_000 + n / 50 + latency, "short", RIGHT, 1, 1.0, 9.0, 1.0, 12.0)
            for n in range(200)
        ]
        found = point(load, samples, calls=200, queue_s=0.2, compute_s=1.4)
        points.append(replace(found, throughput=min(clients / 0.02, 100.0 * load.tritons), rate=100 * load.share))
    return points


@pytest.mark.slow
def test_the_report_holds_every_point(tmp_path: Path) -> None:
    points = all_points()
    report.write_report(tmp_path, {"title": "a <toy>", "date": "2026-01-01", "machine": {"cores": 2}}, points)
    with (tmp_path / "points.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(points) == 54 + 7 + 7 + 3
    assert rows[0].keys() == Point.__dataclass_fields__.keys()
    assert json.loads(rows[0]["outcomes"]) == {RIGHT: 200}

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    document = json.loads((tmp_path / "points.json").read_text(), parse_constant=refuse)
    assert len(document["points"]) == len(points)
    assert {curve["knee_clients"] for curve in document["knee"]["curves"]} == {2}
    assert "95 %" in document["knee"]["definition"] or "KNEE" in document["knee"]["definition"]
    page = (tmp_path / "report.html").read_text()
    assert "a &lt;toy&gt;" in page
    assert 'src="http' not in page
    assert page.count("data:image/png;base64,") == 2
    assert page.count("<tr>") > len(points)
    for name in ("throughput", "latency"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_engines_are_drawn_on_the_same_axes() -> None:
    served: dict[str, figures.Curve] = {"batch 1": {1: (20.0, 50.0), 4: (24.0, 170.0)}, "batch 8": {1: (19.0, 52.0)}}
    figure = figures.draw_engines({"batch 1": {1: (21.0, 49.0)}}, served, "toy")
    alone, beside, _, p99 = figure.axes
    assert [line.get_label() for line in alone.lines] == ["batch 1"]
    assert [line.get_label() for line in beside.lines] == ["batch 1", "batch 8"]
    assert alone.get_ylim() == beside.get_ylim()
    assert p99.lines[0].get_xydata().tolist() == [[1, 50], [4, 170]]  # type: ignore[union-attr]


def test_a_sweep_goes_on_where_it_ended(tmp_path: Path) -> None:
    args = parse(SweepOptions, ["--output", str(tmp_path), "--quick"])
    points = all_points()
    (tmp_path / "points.jsonl").write_text("".join(json.dumps(vars_of(each)) + "\n" for each in points))
    again = sweep.read_points(tmp_path)
    assert [each.load for each in again] == [each.load for each in points]
    left = [load for load in sweep.plan(args) if load not in {each.load for each in again}]
    assert left == []
    assert len(sweep.plan(args)) == 8 + 2 + 4 + 2


def vars_of(each: Point) -> dict[str, Any]:
    return {name: getattr(each, name) for name in Point.__dataclass_fields__}


def test_bad_arguments_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--balancer", "none"], "--replicas 1 alone"),
        (["--clients", "0"], "must be at least 1"),
    ):
        with pytest.raises(SystemExit):
            parse(SweepOptions, arguments)
        assert message in capsys.readouterr().err


# The servers


def test_the_balancer_has_the_stack_s_configuration(tmp_path: Path) -> None:
    text = servers.HAPROXY_CFG.read_text()
    path = tmp_path / "haproxy.cfg"
    path.write_text(servers.haproxy_config(text, 18_000, 18_405, ["127.0.0.1:1", "127.0.0.1:2"]))
    program = shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin")
    assert program, "apt-get install haproxy"
    done = subprocess.run([program, "-c", "-f", str(path)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    kept = set(text.splitlines()) & set(path.read_text().splitlines())
    assert "    balance leastconn" in kept
    with pytest.raises(ValueError, match="found 0 times"):
        servers.haproxy_config(text.replace("server-template", "server"), 1, 2, [])


# The clients, against servers whose behaviour is known


def run_locust(url: str, directory: Path, **flags: object) -> list[Sample]:
    """Run the clients on the requests in a directory; gives their samples."""
    command = [sys.executable, "-m", "locust", "--headless", "--only-summary", "--exit-code-on-error", "0"]
    command += ["--locustfile", "loadtest/locustfile.py", "--host", url, "--result", str(directory / "result.json")]
    command += ["--requests", str(directory / "requests.jsonl"), "--spawn-rate", "100"]
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, cwd=servers.PROJECT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return read_samples(json.loads((directory / "result.json").read_text()))


class Stalling(ThreadingHTTPServer):
    """Answers at once, but for one second beginning one second after the first request: then not before its end."""

    daemon_threads = True
    request_queue_size = 1_000
    first: float | None = None

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            server = self.server
            assert isinstance(server, Stalling)
            context = json.loads(self.rfile.read(int(self.headers["content-length"])))["context"]
            server.first = server.first or time.monotonic()
            since = time.monotonic() - server.first
            if 1 < since < 2:
                time.sleep(2 - since)
            body = reply((context[:4], 0, 4, 0))
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""


@pytest.fixture
def stalling() -> Iterator[str]:
    with Stalling(("127.0.0.1", 0), Stalling.Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.alone
def test_a_stall_is_seen_by_all_who_were_due_in_it(stalling: str, tmp_path: Path) -> None:
    """Of three seconds one is lost: a third of the requests waits, evenly from no time to a second."""
    write_requests(tmp_path / "requests.jsonl", make_requests(toy_examples(), "short", 12))
    samples = run_locust(stalling, tmp_path, users=1, rate=80, seconds=3)
    assert {each.outcome for each in samples} == {RIGHT}
    assert len(samples) == pytest.approx(240, abs=60)  # four standard deviations: none was held back
    waited = np.array([each.ended - each.due for each in samples])
    assert np.percentile(waited, 50) < 0.25
    assert np.percentile(waited, 95) == pytest.approx(0.85, abs=0.2)
    assert np.mean(waited > 0.5) == pytest.approx(1 / 6, abs=0.08)


@pytest.mark.alone
def test_a_closed_loop_is_slowed_down_by_a_stall(stalling: str, tmp_path: Path) -> None:
    """What the fixed rate is there for: one client sends one request into the second that is lost."""
    write_requests(tmp_path / "requests.jsonl", make_requests(toy_examples(), "short", 12))
    samples = run_locust(stalling, tmp_path, users=1, seconds=3)
    waited = [each.ended - each.due for each in samples]
    assert sum(each > 0.5 for each in waited) == 1
    assert np.percentile(waited, 95) < 0.25


@pytest.mark.alone
def test_several_processes_make_one_load(url: str, tmp_path: Path) -> None:
    write_requests(tmp_path / "requests.jsonl", sweep.answered(url, make_requests(toy_examples(), "short", 12)))
    samples = run_locust(url, tmp_path, users=2, rate=40, seconds=2, processes=2)
    assert {each.outcome for each in samples} == {RIGHT}
    assert len(samples) == pytest.approx(80, abs=36)


@pytest.mark.slow
def test_a_small_load_test_of_the_toy(make_app: Callable[..., FastAPI], tmp_path: Path) -> None:
    args = parse(SweepOptions, ["--seconds", "1", "--warmup", "0.2"])
    asked = [each for kind in KINDS for each in make_requests(toy_examples(), kind, 6)]
    path, points = tmp_path / "requests.jsonl", []
    with serving(make_app()) as url:
        known = sweep.answered(url, asked)
        write_requests(path, known)
        stack = servers.Stack(url, [], [], None)
        for clients in (1, 4):
            load = Load(phase="closed", clients=clients, mix="short=4,several=1,long=1")
            points.append(sweep.measure(args, stack, load, path, rate=0))
        points.append(sweep.measure(args, stack, Load(phase="open", share=0.5), path, rate=20))
        answer = known[0].answer
        assert answer
        write_requests(path, [replace(known[0], answer=replace(answer, start=answer.start + 1)), *known[1:6]])
        wrong = sweep.measure(args, stack, Load(phase="workload", clients=1), path, rate=0)
    for each in points:
        assert each.throughput > 0
        assert each.outcomes.keys() == {RIGHT}
        assert each.http_ms > 0
        assert each.cpu_clients_ms > 0
    assert points[0].kinds.keys() <= set(KINDS)
    assert wrong.wrong > 0
    assert wrong.right > 0
    report.write_report(tmp_path, {"title": "toy", "date": ""}, [*points, wrong])
    assert 'class="bad"' in (tmp_path / "report.html").read_text()


def test_what_is_refused_for_now_is_counted_apart(
    make_app: Callable[..., FastAPI], engine: Any, tmp_path: Path
) -> None:
    requests = make_requests(toy_examples(), "short", 12)
    write_requests(tmp_path / "requests.jsonl", requests)
    engine.delay_s = 0.5
    with serving(make_app(max_in_flight=1, max_wait_s=0.2)) as url:
        samples = run_locust(url, tmp_path, users=4, seconds=2)
    outcomes = Counter(each.outcome for each in samples)
    assert outcomes.keys() == {RIGHT, "shed 503 engine_overloaded"}
    assert len(samples) <= 4 * 8  # who was refused waited as long as it was told to, one second


class Busy(ThreadingHTTPServer):
    """Refuses the first ``refusals`` requests with ``retry-after: 1``; keeps the time and body of each request."""

    daemon_threads = True

    def __init__(self, refusals: int) -> None:
        super().__init__(("127.0.0.1", 0), self.Handler)
        self.refusals = refusals
        self.seen: list[tuple[float, bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            server = self.server
            assert isinstance(server, Busy)
            body = self.rfile.read(int(self.headers["content-length"]))
            server.seen.append((time.monotonic(), body))
            refused = len(server.seen) <= server.refusals
            reply = b'{"error_type": "engine_overloaded"}' if refused else b'{"answers": []}'
            self.send_response(503 if refused else 200)
            self.send_header("content-length", str(len(reply)))
            if refused:
                self.send_header("retry-after", "1")
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_: object) -> None:
            pass


def test_a_refused_client_asks_the_same_again_no_sooner_than_told(tmp_path: Path) -> None:
    write_requests(tmp_path / "requests.jsonl", make_requests(toy_examples(), "short", 12))
    with Busy(2) as server:
        threading.Thread(target=server.serve_forever).start()
        run_locust(f"http://127.0.0.1:{server.server_port}", tmp_path, users=1, seconds=6)
        server.shutdown()
    (first, body), (second, again), (third, once_more), (_, other) = server.seen[:4]
    assert body == again == once_more != other
    assert min(second - first, third - second) >= 1.0


def test_the_light_clients_give_a_refused_question_up_in_the_end() -> None:
    with Busy(1_000) as server:
        threading.Thread(target=server.serve_forever).start()
        requests = itertools.repeat((0, http_post("127.0.0.1", server.server_port, "/", b"{}")))
        run = closed_loop("127.0.0.1", server.server_port, requests, 1, until=lambda sent: sent >= 1, timeout_s=2.0)
        (reply,) = asyncio.run(run).replies
        server.shutdown()
    assert (reply.status, reply.shed) == (503, 1)
    assert 1.0 <= reply.seconds < 2.0
    assert 0 < reply.attempt_s < reply.seconds <= reply.ended_s
    (first, _), (second, _) = server.seen
    assert second - first >= 1.0


def test_a_service_that_wants_a_key_gets_it(
    make_app: Callable[..., FastAPI], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_requests(tmp_path / "requests.jsonl", make_requests(toy_examples(), "short", 12))
    keys = tmp_path / "keys"
    monkeypatch.setenv("BERTQA_API_KEY", new_key(keys, "load-test", None, None))
    with serving(make_app(api_keys_file=str(keys))) as url:
        assert {each.outcome for each in run_locust(url, tmp_path, users=2, seconds=1)} == {RIGHT}
        monkeypatch.delenv("BERTQA_API_KEY")
        assert {each.outcome for each in run_locust(url, tmp_path, users=2, seconds=1)} == {"error 401 unauthorized"}


@pytest.mark.slow
@pytest.mark.triton
def test_replicas_with_engines_of_their_own_before_a_real_balancer(bundle: Bundle, tmp_path: Path) -> None:
    """Triton, service and HAProxy, and the command from its beginning to its end."""
    publish_toy_bundle(Repository(tmp_path / "source"), bundle, 1)
    arguments = ["--phases", "scaling", "--replicas", "2", "--seconds", "1", "--warmup", "0.5", "--questions", "16"]
    (tmp_path / "toy.json").write_text(json.dumps(as_squad(toy_examples())))
    arguments += ["--data", str(tmp_path / "toy.json"), "--repository", str(tmp_path / "source")]
    arguments += ["--output", str(tmp_path / "output")]
    sweep.main(parse(SweepOptions, arguments))
    (found,) = sweep.read_points(tmp_path / "output")
    # One that finds the queue longer than it may be, as beside a test on the same cores, is refused.
    assert found.outcomes.keys() <= {RIGHT, "shed 503 engine_overloaded"}
    assert found.throughput > 0
    assert found.compute_ms >= 1e3 * sweep.SLEEP_S
    assert min(found.cpu_service_ms, found.cpu_triton_ms, found.memory_triton_mib) > 0
    assert (tmp_path / "output" / "report.html").is_file()
