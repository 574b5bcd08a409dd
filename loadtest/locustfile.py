"""Users who ask real questions over REST, as fast as they are answered, and check every reply.

locust --headless --locustfile loadtest/locustfile.py --host http://127.0.0.1:8000 --users 16 --run-time 60s
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from locust import FastHttpUser, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment

GATE = Path(__file__).resolve().parent.parent / "checkpoints" / "minilm-l6-squad" / "gate.json"


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]
def add_flags(parser: LocustArgumentParser) -> None:
    """Add our flag to locust's own."""
    parser.add_argument(
        "--questions", default=str(GATE), env_var="BERTQA_QUESTIONS", help="SQuAD file (default: %(default)s)"
    )


@events.test_start.add_listener  # type: ignore[untyped-decorator]
def read_questions(environment: Environment, **_: Any) -> None:
    """Give the users their questions; each takes the next one, round and round."""
    document = json.loads(Path(environment.parsed_options.questions).read_bytes())  # type: ignore[union-attr]
    Asker.bodies = itertools.cycle(
        {"question": qas["question"], "context": paragraph["context"]}
        for article in document["data"]
        for paragraph in article["paragraphs"]
        for qas in paragraph["qas"]
    )


class Asker(FastHttpUser):
    """Asks the next question when the last one is answered."""

    bodies: Iterator[dict[str, str]]

    @task
    def answer(self) -> None:
        """A reply whose answers are not the pieces of the text that they claim to be is a failure, as an error is."""
        body = next(self.bodies)
        with self.rest("POST", "/v1/answer", json=body) as response:
            if response.status_code != 200 or response.js is None:
                return  # locust counts it
            for answer in response.js["answers"] or [{"text": "none", "start": 0, "end": 0}]:
                assert body["context"][answer["start"] : answer["end"]] == answer["text"]  # locust counts it
