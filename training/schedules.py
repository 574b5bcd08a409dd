"""Learning rates as pure functions of the step, so that a resumed run needs no scheduler's state.

A schedule gives the share of the peak learning rate at a step; steps count from 0 within one run, so the second phase
of a pre-training, which is a run of its own, warms up by itself. The peak belongs to the *global* batch, the sequences
of one step over all processes together: `scaled_learning_rate` carries it from one batch size to another.
"""

import math
from typing import Literal

ScalingRule = Literal["sqrt", "linear"]


def linear(step: int, steps: int, warmup: float) -> float:
    """Share of the peak learning rate: linear from 0 over the warm-up, then linear to 0 after the last step.

    That of Devlin et al. 2018. No step has rate 0: the first has 1 / (steps of the warm-up), the last 1 / (the others).

    Args:
        step: from 0.
        steps: of the whole run.
        warmup: share of the steps with rising learning rate, from 0 to below 1; at least one step rises.
    """
    rising = _rising(steps, warmup)
    return (step + 1) / rising if step < rising else max(steps - step, 0) / max(steps - rising, 1)


def poly(step: int, steps: int, warmup: float, power: float = 0.5) -> float:
    """Share of the peak learning rate: linear from 0 over the warm-up, then (1 - progress) to a power; as `linear`.

    That of NVIDIA's BERT with LAMB. Progress is that of the *whole* run, warm-up included, so the rate drops at the end
    of the warm-up: by 15 % in phase 1, where the warm-up is 0.2843 of the steps. NVIDIA's two implementations count
    the steps differently, from 1 in PyTorch, where the last step has rate 0, and from 0 in TensorFlow, where the first
    has; here the warm-up counts from 1 and the decay from 0, so that no step is lost.
    """
    rising = _rising(steps, warmup)
    return (step + 1) / rising if step < rising else max(1 - step / steps, 0.0) ** power


def scaled_learning_rate(base: float, base_batch: int, batch: int, rule: ScalingRule = "sqrt") -> float:
    """The peak learning rate of a global batch, from one that is known to be good for another batch.

    Args:
        base: learning rate that is good for ``base_batch``.
        base_batch: sequences per step over all processes together.
        batch: likewise, of the run at hand.
        rule: "sqrt" keeps the variance of an update, right for LAMB (You et al. 2019) and Adam; "linear"
            is the rule of Goyal et al. 2017 for SGD.

    Raises:
        ValueError: a batch is empty.
    """
    if base_batch < 1 or batch < 1:
        raise ValueError(f"a batch has at least one sequence, not {min(base_batch, batch)}")
    factor = batch / base_batch
    return base * (math.sqrt(factor) if rule == "sqrt" else factor)


def _rising(steps: int, warmup: float) -> int:
    return max(round(warmup * steps), 1)
