"""Judge replies, and keep the measurements of each."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from loadtest.workload import Answer, Asked

RIGHT = "right"
"""Outcome of a reply with the known right answer; if none is known, of one with a piece of its text."""
SHED, WRONG, ERROR = "shed", "wrong", "error"
"""First word of the other outcomes: refused with a retry time; answered wrongly; failed."""


class Sample(NamedTuple):
    """A request and its reply; times in seconds since 1970, stages in milliseconds from the reply."""

    due: float  # when it had to be sent; without a rate that is when it was
    sent: float
    ended: float
    kind: str
    outcome: str
    windows: int = 0
    tokenize_ms: float = 0.0
    infer_ms: float = 0.0
    decode_ms: float = 0.0
    total_ms: float = 0.0


def judge(asked: Asked, status: int, headers: Mapping[str, str], body: bytes) -> tuple[str, dict[str, Any]]:
    """Judge a reply.

    Args:
        asked: what was asked.
        status: HTTP status; 0 if no reply came, and then the body says why.
        headers: of the reply, by names in lower case.
        body: of the reply.

    Returns:
        The outcome, `RIGHT` or a sentence that begins with `SHED`, `WRONG` or `ERROR`; and the parsed body, empty
        unless an answer came.
    """
    if not status:
        return f"{ERROR} no reply: {body.decode(errors='replace')}", {}
    try:
        reply = json.loads(body)
    except ValueError:
        reply = None
    if not isinstance(reply, dict):
        return f"{WRONG if status == 200 else ERROR} {status} not a JSON object", {}
    if status != 200:
        shed = status in (429, 503) and "retry-after" in headers
        return f"{SHED if shed else ERROR} {status} {reply.get('error_type')}", {}
    try:
        answers = [Answer(each["text"], each["start"], each["end"], each["context_index"]) for each in reply["answers"]]
        pieces = [asked.contexts[each.context_index][each.start : each.end] for each in answers]
    except (KeyError, TypeError, IndexError):
        return f"{WRONG} not an answer", reply
    if not answers or not all(each.text for each in answers):
        return f"{WRONG} empty", reply
    if pieces != [each.text for each in answers]:
        return f"{WRONG} not a piece of its text", reply
    if asked.answer and answers[0] != asked.answer:
        return f"{WRONG} another answer than the undisturbed service gave", reply
    return RIGHT, reply


def best_answer(reply: Mapping[str, Any]) -> Answer:
    """The first answer of a reply that was found `RIGHT`."""
    first = reply["answers"][0]
    return Answer(first["text"], first["start"], first["end"], first["context_index"])
