r"""Locust clients that ask real questions over REST and check every reply.

Closed loop: each client sends its next request when the last one is answered. A refused client waits for
``retry-after``, and up to half as long again, and then asks the same question; each attempt is counted:

locust --headless --locustfile loadtest/locustfile.py --host http://127.0.0.1:8000 --users 16 --spawn-rate 16 \
    --run-time 60s

At a fixed rate, whatever the answers take: add ``--rate 100``. Requests are then sent when they are due, and latency is
counted from that moment on, so that a service that stalls cannot slow its own test down ("coordinated omission", Gil
Tene). One user makes all arrivals of its process; ``--users`` should be the number of processes.

More load than one process makes: add ``--processes 4``, or ``--master`` and ``--worker`` on several machines.

A service that wants an API key gets the one in ``BERTQA_API_KEY``; give it no rate, or what is beyond counts as shed.
"""

import json
import os
import time
from pathlib import Path
from typing import Any, ClassVar

import gevent
from gevent.pool import Group
from locust import FastHttpUser, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.exception import StopUser
from locust.runners import MasterRunner, WorkerRunner

from bertqa.backoff import spread
from bertqa.squad import read_squad
from loadtest.replies import RIGHT, SHED, Sample, judge
from loadtest.workload import Asked, Draw, due_times, make_requests, parse_mix, read_requests

GATE = Path(__file__).resolve().parent.parent / "checkpoints" / "minilm-l6-squad" / "gate.json"
PATH = "/v1/answer"
KEY = os.environ.get("BERTQA_API_KEY")  # a flag could be read in the list of processes
HEADERS = {"content-type": "application/json"} | ({"authorization": f"Bearer {KEY}"} if KEY else {})
DRAIN_S = 30.0
"""Longest wait for outstanding replies at the end."""
PATIENCE_S = 60.0
"""Seconds for one question in closed loop, with all attempts and waits."""


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]
def add_flags(parser: LocustArgumentParser) -> None:
    """Add our flags to locust's own."""
    flags = parser.add_argument_group("bertqa")
    flags.add_argument(
        "--questions", default=str(GATE), env_var="BERTQA_QUESTIONS", help="SQuAD file (default: %(default)s)"
    )
    flags.add_argument("--requests", help="file of loadtest.sweep with requests and their answers, instead")
    flags.add_argument("--mix", default="short", help="kinds with weights: short=8,long=1,several=1 (default: short)")
    flags.add_argument("--repeat", choices=("unique", "zipf"), default="unique", help="(default: %(default)s)")
    flags.add_argument("--rate", type=float, default=0.0, help="arrivals/s of all users; 0: closed loop (default)")
    flags.add_argument("--warmup", type=float, default=0.0, help="seconds before what is measured begins")
    flags.add_argument("--seconds", type=float, default=0.0, help="seconds that are measured, instead of --run-time")
    flags.add_argument("--result", help="file for all samples, as JSON")


class Run:
    """State that the clients of this process share; on a master, also the samples of its workers."""

    def __init__(self, environment: Environment) -> None:
        options: Any = environment.parsed_options
        self.began = time.time()
        self.cpu_began = time.process_time()
        self.seconds = options.warmup + options.seconds if options.seconds else float("inf")
        self.samples: list[tuple[Any, ...]] = []
        self.cpu_s = 0.0  # of workers
        self.ended: set[str] = set()  # workers
        self.rate = options.rate / max(options.num_users or 1, 1)
        self.seed = os.getpid()
        if not isinstance(environment.runner, MasterRunner):
            mix = parse_mix(options.mix)
            if options.requests:
                asked = read_requests(Path(options.requests))
            else:
                examples = read_squad(Path(options.questions))
                asked = [each for kind in mix for each in make_requests(examples, kind, len(examples))]
            self.draw = Draw(asked, mix, options.repeat, self.seed)

    @property
    def is_over(self) -> bool:
        """Whether the run has ended and no more requests are sent."""
        return time.time() >= self.began + self.seconds

    def take_report(self) -> tuple[list[tuple[Any, ...]], float]:
        """Samples and seconds of CPU since the last report."""
        samples, self.samples = self.samples, []
        cpu, self.cpu_began = time.process_time() - self.cpu_began, time.process_time()
        return samples, cpu


class Asker(FastHttpUser):
    """A client; with a rate, all arrivals of its process."""

    concurrency = 4096  # connections of one user: with a rate it has many requests under way
    network_timeout = connection_timeout = DRAIN_S
    shared: ClassVar[Run]

    @task
    def work(self) -> None:
        """Ask the next question, or with a rate all of them."""
        if self.shared.rate:
            self.arrive()
        elif self.shared.is_over:
            raise StopUser
        else:
            self.ask_until_answered()

    def ask_until_answered(self) -> None:
        """Ask the next question, again whenever the service is busy, as its ``retry-after`` says and with jitter."""
        asked, body = next(self.shared.draw)
        give_up = time.time() + PATIENCE_S
        while (asked_s := self.ask(asked, body)) is not None:
            wait_s = spread(asked_s)
            if time.time() + wait_s > give_up or self.shared.is_over:
                return
            gevent.sleep(wait_s)

    def arrive(self) -> None:
        """Send requests when they are due, answered or not; ends with the run."""
        began, under_way = time.time(), Group()
        for due in due_times(self.shared.rate, self.shared.seed):
            gevent.sleep(max(0.0, began + due - time.time()))
            if self.shared.is_over:
                break
            under_way.spawn(self.ask, *next(self.shared.draw), began + due)
        under_way.join(DRAIN_S)
        raise StopUser

    def ask(self, asked: Asked, body: str, due: float | None = None) -> float | None:
        """Ask a question once and keep the sample; returns the seconds to wait if the service is busy, else None."""
        sent = time.time()
        with self.client.request(
            "POST",
            PATH,
            name=f"{PATH} {asked.kind}",
            data=body,
            headers=HEADERS,
            catch_response=True,
        ) as response:
            ended = time.time()
            headers = {name.lower(): value for name, value in (response.headers or {}).items()}
            content = response.content or b"" if response.status_code else str(response.error).encode()
            outcome, reply = judge(asked, response.status_code, headers, content)
            timings = reply.get("timings", {})
            due = sent if due is None else due
            response.request_meta["response_time"] = 1000 * (ended - due)
            if outcome == RIGHT:
                response.success()
            else:
                response.failure(outcome)
        stages = (float(timings.get(f"{stage}_ms", 0)) for stage in ("tokenize", "infer", "decode", "total"))
        self.shared.samples.append(Sample(due, sent, ended, asked.kind, outcome, reply.get("windows", 0), *stages))
        return float(headers["retry-after"]) if outcome.startswith(SHED) else None


@events.test_start.add_listener  # type: ignore[untyped-decorator]
def start(environment: Environment, **_: Any) -> None:
    """Prepare the shared state; the leading process also ends the run."""
    Asker.shared = Run(environment)
    if not isinstance(environment.runner, WorkerRunner) and environment.parsed_options.seconds:  # type: ignore[union-attr]
        gevent.spawn(quit_at_the_end, environment)


def quit_at_the_end(environment: Environment) -> None:
    """End the run when all clients have ended; workers report that with their last samples."""
    gevent.sleep(Asker.shared.seconds)
    give_up, runner = time.time() + DRAIN_S + 10, environment.runner
    assert runner

    def goes_on() -> bool:
        return (
            len(Asker.shared.ended) < len(runner.clients) if isinstance(runner, MasterRunner) else runner.user_count > 0
        )

    while goes_on() and time.time() < give_up:
        gevent.sleep(0.05)
    runner.quit()


@events.report_to_master.add_listener  # type: ignore[untyped-decorator]
def tell_master(data: dict[str, Any], **_: Any) -> None:
    """Send the samples since the last report."""
    if hasattr(Asker, "shared"):
        data["samples"], data["cpu_s"] = Asker.shared.take_report()
        data["is_over"] = Asker.shared.is_over


@events.worker_report.add_listener  # type: ignore[untyped-decorator]
def hear_worker(client_id: str, data: dict[str, Any], **_: Any) -> None:
    """Keep the samples of a worker."""
    if "samples" in data:
        Asker.shared.samples += data["samples"]
        Asker.shared.cpu_s += data["cpu_s"]
        if data["is_over"] and not data["user_count"]:  # which locust itself tells
            Asker.shared.ended.add(client_id)


@events.quitting.add_listener  # type: ignore[untyped-decorator]
def write_result(environment: Environment, **_: Any) -> None:
    """Write the samples, in the leading process."""
    options: Any = environment.parsed_options
    if not options.result or isinstance(environment.runner, WorkerRunner) or not hasattr(Asker, "shared"):
        return
    samples, cpu_s = Asker.shared.take_report()
    result = {
        "began": Asker.shared.began + options.warmup,
        "seconds": options.seconds,
        "cpu_s": Asker.shared.cpu_s + cpu_s,
        "fields": Sample._fields,
        "samples": samples,
    }
    Path(options.result).write_text(json.dumps(result))
