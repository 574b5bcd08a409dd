"""Learning rates as pure functions of the step, so that a resumed run needs no scheduler state.

A schedule returns the share of the peak learning rate at a step. Steps count from 0 in each run, so the second phase of
pre-training, a separate run, has its own warm-up. The peak is for the *global* batch, the sequences of one step over
all processes: `scaled_learning_rate` converts it from one batch size to another.
"""

import math
from typing import Literal

ScalingRule = Literal["sqrt", "linear"]


def linear(step: int, steps: int, warmup: float) -> float:
    """Return the share of the peak rate: rise linearly from 0 over the warm-up, then fall linearly to 0 at the end.

    This is the schedule of Devlin et al. 2018. No step has rate 0: the first has 1 / (warm-up steps), the last 1 /
    (other steps).

    Args:
        step: step, from 0.
        steps: number of steps in the whole run.
        warmup: share of the steps with a rising learning rate, at least 0 and below 1; at least one step rises.
    """
    rising = _rising(steps, warmup)
    return (step + 1) / rising if step < rising else max(steps - step, 0) / max(steps - rising, 1)


def poly(step: int, steps: int, warmup: float, power: float = 0.5) -> float:
    """Return the share of the peak rate: linear warm-up as in `linear`, then (1 - progress) to a power.

    This is the schedule of NVIDIA's BERT with LAMB. Progress is over the *whole* run, warm-up included, so the rate
    drops at the end of the warm-up: by 15 % in phase 1, where the warm-up is 0.2843 of the steps. NVIDIA's two
    implementations count steps differently: from 1 in PyTorch, where the last step has rate 0, and from 0 in
    TensorFlow, where the first step has. Here the warm-up counts from 1 and the decay from 0, so that no step is lost.
    """
    rising = _rising(steps, warmup)
    return (step + 1) / rising if step < rising else max(1 - step / steps, 0.0) ** power


def scaled_learning_rate(base: float, base_batch: int, batch: int, rule: ScalingRule = "sqrt") -> float:
    """Convert a peak learning rate from one global batch size to another.

    Args:
        base: good learning rate for ``base_batch``.
        base_batch: number of sequences per step over all processes.
        batch: the same number in this run.
        rule: "sqrt" keeps the variance of an update, right for LAMB (You et al. 2019) and Adam; "linear"
            is the rule of Goyal et al. 2017 for SGD.

    Raises:
        ValueError: a batch size is below 1.
    """
    if base_batch < 1 or batch < 1:
        raise ValueError(f"a batch must have at least one sequence, not {min(base_batch, batch)}")
    factor = batch / base_batch
    return base * (math.sqrt(factor) if rule == "sqrt" else factor)


def _rising(steps: int, warmup: float) -> int:
    return max(round(warmup * steps), 1)
