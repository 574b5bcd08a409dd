"""A real question that proves that a model answers."""

import time

from service.inference.admission import Call
from service.inference.pipeline import Pipeline
from service.inference.question import Question
from service.inference.registry import ServedModel
from service.triton.errors import EngineUnavailable

EVIDENCE_S = 1.0
"""Seconds for which an engine call that succeeded proves that the engine answers."""


async def is_ready(pipeline: Pipeline, model: ServedModel, patience_s: float) -> None:
    """Return if a model answers, as its latest probe found; at most one a second is made, however many ask.

    Raises:
        Exception: as `check_ready`, with a deadline ``patience_s`` seconds from the start of the probe.
    """
    await model.readiness.ask(lambda: check_ready(pipeline, model, time.monotonic() + patience_s))


async def check_ready(pipeline: Pipeline, model: ServedModel, deadline: float) -> None:
    """Compare the engine with its bundle, and see it answer: a client a moment ago, or a question of our own.

    Raises:
        BundleMismatch: as in `ServedModel.verify`.
        EngineError: the engine does not answer.
        InvalidLogits: it answers nonsense.
    """
    try:
        await model.admin.check_ready(deadline=deadline)
        await model.compare(deadline=deadline)  # a probe is the moment to notice that Triton has another loaded
    except EngineUnavailable:
        model.verified = False  # it may come back as another
        raise
    evidence_s = max(EVIDENCE_S, 2 * model.admission.call_s)
    if time.monotonic() > model.admission.answered_at + evidence_s:
        asked = Question(model=model, question="Is it ready?", contexts=("It is ready.",))
        await pipeline.run([asked], Call(deadline))  # without admission: a busy engine is ready
