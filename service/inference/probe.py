"""Check that a model answers, with a real question."""

import time

from service.inference.admission import Call
from service.inference.pipeline import Pipeline
from service.inference.question import Question
from service.inference.registry import ServedModel
from service.triton.errors import EngineUnavailable

EVIDENCE_S = 1.0
"""Seconds for which a successful engine call proves that the engine works."""


async def is_ready(pipeline: Pipeline, model: ServedModel, patience_s: float) -> None:
    """Check that a model answers; all callers within a second share one probe.

    Raises:
        Exception: as `check_ready`, with a deadline ``patience_s`` seconds from the start of the probe.
    """
    await model.readiness.ask(lambda: check_ready(pipeline, model, time.monotonic() + patience_s))


async def check_ready(pipeline: Pipeline, model: ServedModel, deadline: float) -> None:
    """Check that the engine belongs to its bundle and that it works: a client's call just succeeded, or ours does now.

    Raises:
        BundleMismatch: as in `ServedModel.verify`.
        EngineError: the engine does not answer.
        InvalidLogits: the output of the engine is unusable.
    """
    try:
        await model.admin.check_ready(deadline=deadline)
        await model.compare(deadline=deadline)  # detects that Triton has loaded another engine
    except EngineUnavailable:
        model.verified = False  # Triton may come back with another engine
        raise
    evidence_s = max(EVIDENCE_S, 2 * model.admission.call_s)
    if time.monotonic() > model.admission.answered_at + evidence_s:
        asked = Question(model=model, question="Is it ready?", contexts=("It is ready.",))
        await pipeline.run([asked], Call(deadline))  # skips admission: a busy engine is ready
