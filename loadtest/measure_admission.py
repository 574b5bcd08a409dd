"""Whether admission serves people: clients that do not try again, at and beyond what a slow engine can answer.

Starts the real product with an engine that sleeps for each window, so that the engine is the limit and not this
machine. Prints a table, and which goals are met:

- 8 clients that ask without pause: none of 1,000 requests is refused.
- 64 clients that ask ten times what can be answered: at least 0.95 of the peak is answered, and 99 % of the answers
  come within the bound on waiting and two engine calls.
- A client of single questions beside one that sends 64 in a call: nothing is refused, and half of its answers come
  within four engine calls. (Queued by questions, it would wait for 64.)

python -m loadtest.measure_admission
"""

if __name__ == "__main__":  # before the imports, because --help needs none of them
    from bertqa.cli.command import run
    from loadtest.commands import admission_app

    run(admission_app, "python -m loadtest.measure_admission")


import asyncio
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import psutil

from bertqa.hardware import cpu_name
from bertqa.squad import read_squad
from loadtest.closed_loop import Load, closed_loop, for_seconds, http_post
from loadtest.commands import AdmissionOptions
from loadtest.servers import Product
from loadtest.sleeping_engine import write_repository

MAX_WAIT_S = 2.0
"""Default of ``BERTQA_MAX_WAIT_S``."""
CLIENTS, CROWD, FACTOR, TOGETHER = 8, 64, 10, 64
PEAK_SHARE = 0.95
HTTP = 1.01
"""Of the times that clients see, what they and the connection add."""


@dataclass(frozen=True)
class Goal:
    """Something that must hold."""

    text: str
    is_met: bool

    def __str__(self) -> str:
        return f"- {'met' if self.is_met else 'NOT MET'}: {self.text}"


@dataclass(frozen=True)
class Outcome:
    """What some clients saw."""

    name: str
    load: Load

    @property
    def answered(self) -> list[float]:
        """Seconds of each answer."""
        return [reply.seconds for reply in self.load.replies if reply.status == 200]

    @property
    def refused(self) -> int:
        """Requests that were told to come later."""
        return sum(reply.status == 503 for reply in self.load.replies)

    @property
    def failed(self) -> list[str]:
        """What was neither."""
        return [f"{each.status} {each.body[:200]!r}" for each in self.load.replies if each.status not in (200, 503)]

    @property
    def rate(self) -> float:
        """Answers a second."""
        return len(self.answered) / self.load.seconds

    def percentile(self, percent: float) -> float:
        """Seconds within which so many of the answers came."""
        return float(np.percentile(self.answered, percent)) if self.answered else float("inf")

    def row(self) -> str:
        """A row of the table."""
        return (
            f"| {self.name} | {len(self.load.replies):,} | {len(self.answered):,} | {self.refused:,} | "
            f"{len(self.failed):,} | {self.rate:.2f} | {self.percentile(50):.2f} | {self.percentile(99):.2f} |"
        )


HEAD = "| clients | requests | answered | refused | failed | answers/s | p50 s | p99 s |\n" + "|---|" + "---:|" * 7


class Admission:
    """The measurements, against one service."""

    def __init__(
        self,
        host: str,
        port: int,
        questions: Sequence[dict[str, str]],
        *,
        call_s: float,
        instances: int,
        max_wait_s: float = MAX_WAIT_S,
    ) -> None:
        """Prepare the requests.

        Args:
            host: of the service.
            port: likewise.
            questions: bodies of ``/v1/answer``, each of one window.
            call_s: seconds of an engine call.
            instances: engine calls computed at one time.
            max_wait_s: the service's bound on waiting.
        """
        self._host, self._port, self._max_wait_s = host, port, max_wait_s
        self._call_s, self._instances = call_s, instances
        self._questions = questions

    def _singles(self) -> Iterator[tuple[int, bytes]]:
        bodies = (json.dumps(each).encode() for each in itertools.cycle(self._questions))
        return enumerate(http_post(self._host, self._port, "/v1/answer", body) for body in bodies)

    def _calls(self) -> Iterator[tuple[int, bytes]]:
        several = list(itertools.islice(itertools.cycle(self._questions), TOGETHER))
        body = json.dumps({"questions": several}).encode()
        return enumerate(itertools.repeat(http_post(self._host, self._port, "/v1/answers", body)))

    async def _run(
        self,
        name: str,
        clients: int,
        until: Callable[[int], bool],
        *,
        requests: Iterator[tuple[int, bytes]] | None = None,
        pace_s: float = 0.0,
    ) -> Outcome:
        requests = requests or self._singles()
        load = await closed_loop(
            self._host, self._port, requests, clients, until=until, retries=False, pace_s=pace_s, timeout_s=120
        )
        return Outcome(name, load)

    async def few(self, requests: int) -> Outcome:
        """8 clients, so many requests, none before the last one of the same client is answered."""
        return await self._run(f"{CLIENTS}, without pause", CLIENTS, lambda sent: sent >= requests)

    async def crowd(self, capacity: float, seconds: float) -> Outcome:
        """64 clients, which ask ten times a capacity in answers a second."""
        name = f"{CROWD}, {FACTOR} times the peak"
        return await self._run(name, CROWD, for_seconds(seconds), pace_s=CROWD / (FACTOR * capacity))

    async def rude(self, seconds: float) -> Outcome:
        """64 clients that ask again at once, refused or not."""
        return await self._run(f"{CROWD}, at once when refused", CROWD, for_seconds(seconds))

    async def beside(self, seconds: float, large: int) -> tuple[Outcome, Outcome]:
        """A client of single questions beside some that send 64 in a call: what it saw, and what they saw."""
        until = for_seconds(seconds)
        name = f"{TOGETHER} questions a call"
        others = asyncio.ensure_future(self._run(f"{large}, {name}", large, until, requests=self._calls()))
        await asyncio.sleep(2 * self._call_s)  # so that they wait already
        single = await self._run(f"1, beside {large} of {name}", 1, until)
        return single, await others

    def goals(self, few: Outcome, crowds: Sequence[Outcome], single: Outcome, *, slack: float = 1.0) -> list[Goal]:
        """What must hold of them; ``slack`` above 1 leaves room for a machine that does other things too."""
        peak = max(few.rate, *(each.rate for each in crowds))
        call_s = max(self._call_s, self._instances / peak)  # with what Triton adds
        bound_s = (self._max_wait_s + 2 * call_s) * HTTP * slack
        share = PEAK_SHARE / slack
        failed = [failure for each in (few, *crowds, single) for failure in each.failed]
        return [
            Goal(f"nothing failed otherwise than by a refusal: {failed[:1] or 'nothing'}", not failed),
            Goal(f"{few.name}: {few.refused} of {len(few.load.replies):,} refused", not few.refused),
            *(
                Goal(
                    f"{each.name}: {each.rate / peak:.3f} of the peak of {peak:.2f}/s; at least {share:.2f}",
                    each.rate >= share * peak,
                )
                for each in crowds
            ),
            *(
                Goal(
                    f"{each.name}: p99 of the answered {each.percentile(99):.2f} s; at most {bound_s:.2f} s",
                    each.percentile(99) <= bound_s,
                )
                for each in crowds
            ),
            Goal(
                f"{single.name}: {single.refused} refused, p50 {single.percentile(50):.2f} s; at most "
                f"{4 * call_s * slack:.2f} s",
                not single.refused and single.percentile(50) <= 4 * call_s * slack,
            ),
        ]


async def measure(admission: Admission, requests: int, seconds: float) -> bool:
    """Print the table and the goals; returns whether all are met."""
    print(HEAD, flush=True)

    def shown(outcome: Outcome) -> Outcome:
        print(outcome.row(), flush=True)
        return outcome

    few = shown(await admission.few(requests))
    crowds = [shown(await admission.crowd(few.rate, seconds)), shown(await admission.rude(seconds))]
    singles = []
    for large in (1, 4):
        single, others = await admission.beside(seconds, large)
        singles.append(shown(single))
        shown(others)
    goals = admission.goals(few, crowds, singles[0])
    print("", *goals, sep="\n")
    return all(goal.is_met for goal in goals)


def one_window_questions(path: Path, product: Product) -> list[dict[str, str]]:
    """Questions of a SQuAD file that are one engine call each."""
    examples = [example for example in read_squad(path) if len(example.context) < 1200]
    found = [
        {"question": each.question, "context": each.context}
        for each in examples
        if len(product.bundle.tokenizer(each.question, each.context).windows) == 1
    ]
    if not found:
        raise ValueError(f"{path}: holds no question of one window")
    return found


def main(args: AdmissionOptions) -> int:
    """Measure; the exit code is 1 if a goal is not met."""
    print(f"{date.today()}, {cpu_name()}, {psutil.cpu_count()} cores, {args.instances} × {args.sleep_ms:g} ms a call\n")
    with tempfile.TemporaryDirectory(prefix="bertqa-admission-") as directory:
        root = Path(directory) / "repository"
        write_repository(root, source=args.repository, seconds=args.sleep_ms / 1000, instances=args.instances)
        with Product(root, BERTQA_ACCESS_LOG="false") as product:
            questions = one_window_questions(args.data, product)
            admission = Admission(
                product.host, product.port, questions, call_s=args.sleep_ms / 1000, instances=args.instances
            )
            return 0 if asyncio.run(measure(admission, args.requests, args.seconds)) else 1
