"""Test the comparison of servers, with toy servers instead of real ones."""

import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from bertqa.squad import Example, Reference
from loadtest.compare_servers import Measured, Plan, compare, rate, report
from loadtest.peers.servers import BASELINE, OURS, Server

TOY = """
import json, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

manner, asked = sys.argv[1], 0

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        global asked
        asked += 1
        query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        start = query["context"].index(query["question"])
        answer = {"answer": query["question"], "start": start, "end": start + len(query["question"])}
        status, headers = 200, {}
        if manner == "wrong" and asked % 2:
            answer["answer"] = "made up"
        if manner == "busy" and asked % 5 == 0:
            status, headers = 503, {"Retry-After": "0"}
        if manner == "broken" and asked % 5 == 0:
            status = 500
        if manner == "dies" and asked > 40:
            print("out of luck", flush=True)
            import os
            os._exit(3)
        if manner == "slow":
            time.sleep(0.02)
        body = json.dumps(answer).encode()
        self.send_response(status)
        for header in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass

ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
"""

EXAMPLES = [
    Example(
        id=str(n), title="", question=f"word{n}", context=f"a text with word{n} in it", references=(Reference(text, 0),)
    )
    for n, text in enumerate(["word0", "word1", "word2", "something else"])
]


def measure(directory: Path, manners: Mapping[str, str], rounds: int = 1) -> tuple[dict[str, Measured], str, list[str]]:
    script = directory / "toy.py"
    script.write_text(TOY)
    chosen = {
        name: Server(f"The {manner} one", [sys.executable, str(script), manner, "{port}"], "/answer")
        for name, manner in manners.items()
    }
    plan = Plan(examples=EXAMPLES, scored=4, clients=[1, 4], seconds=0.3, rounds=rounds)
    lines: list[str] = []
    found = compare(chosen, plan, lines.append)
    return found, report({name: server.title for name, server in chosen.items()}, found, plan), lines


def test_table_and_ratios_hold_what_was_measured(tmp_path: Path) -> None:
    found, text, lines = measure(tmp_path, {BASELINE: "slow", OURS: "quick"}, rounds=2)
    assert [line.partition(":")[0] for line in lines] == [
        "round 1, pipeline", "round 1, ours", "round 2, ours", "round 2, pipeline"
    ]  # fmt: skip
    header, _, slow, quick = text.splitlines()[:4]
    names = [name.strip() for name in header.strip("|").split("|")]
    cells = dict(zip(names, (cell.strip() for cell in quick.strip("|").split("|")), strict=True))
    assert cells["server"] == "The quick one"
    assert float(cells["1 client: requests/s"]) == pytest.approx(rate(found[OURS], 1), abs=0.1)
    assert int(cells["memory MiB"]) > 1
    assert (cells["EM"], cells["errors"], cells["wrong"], cells["shed"]) == ("75.0", "0", "0", "0")
    assert slow.startswith("| The slow one | ")
    # a sleep of 20 ms for each bounds the slow one whatever the machine does
    assert rate(found[BASELINE], 1) < 50
    assert rate(found[BASELINE], 4) < 200
    assert f"- 4 clients: {rate(found[OURS], 4) / rate(found[BASELINE], 4):.2f}× The slow one" in text
    assert len(found[OURS].answers) == len(EXAMPLES)


def test_wrong_answers_errors_and_refusals_are_counted_apart(tmp_path: Path) -> None:
    found, text, _ = measure(tmp_path, {"a": "wrong", "b": "broken", "c": "busy"})
    wrong, broken, busy = found["a"], found["b"], found["c"]
    assert wrong.wrong
    assert not wrong.errors
    assert "made up" in wrong.wrong[0]
    assert "The wrong one: question" in text
    assert broken.errors
    assert not broken.wrong
    assert broken.errors[0].startswith("status 500")
    assert not busy.errors
    assert not busy.wrong
    assert all(reply.status == 200 for loads in busy.loads.values() for load in loads for reply in load.replies)
    assert sum(reply.shed for loads in busy.loads.values() for load in loads for reply in load.replies) > 0
    # what was no answer is no throughput
    replies = broken.loads[4][0].replies
    assert rate(broken, 4) == pytest.approx(sum(r.status == 200 for r in replies) / broken.loads[4][0].seconds)


def test_dead_servers_are_reported_and_the_others_measured(tmp_path: Path) -> None:
    found, text, lines = measure(tmp_path, {"a": "dies", "b": "quick"}, rounds=2)
    assert "exit code 3; out of luck" in found["a"].dead
    assert "The dies one died: ended with exit code 3; out of luck" in text
    assert len(found["b"].loads[1]) == 2
    assert len([line for line in lines if ", a:" in line]) == 1


def test_server_that_cannot_start_is_reported(tmp_path: Path) -> None:
    plan = Plan(examples=EXAMPLES, scored=1, clients=[1], seconds=0.1, rounds=1)
    crashes = Server("Crash", [sys.executable, "-c", "raise SystemExit('no such model')"], "/")
    missing = Server("Missing", [str(tmp_path / "absent")], "/")
    found = compare({"a": crashes, "b": missing}, plan, lambda _: None)
    assert "exit code 1; no such model" in found["a"].dead
    assert "absent" in found["b"].dead
    assert "| Crash | " in report({"a": "Crash", "b": "Missing"}, found, plan)
