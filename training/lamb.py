"""LAMB, the optimizer of large batches, and the choice between it and AdamW.

The step of a tensor is as long as the tensor itself, times the learning rate, so that one rate suits all layers (You et
al. 2019, *Large Batch Optimization for Deep Learning: Training BERT in 76 minutes*, arXiv 1904.00962, algorithm 2).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch

from training.options import OptimizerName

TrustRatio = Literal["decayed", "all"]


class Lamb(torch.optim.Optimizer):
    """LAMB, with the differences between the known implementations as options.

    With the gradient g of a tensor w at step t, from 1::

        m = β1 m + β3 g                       β3 = 1 - β1, or 1 without ``grad_averaging``
        v = β2 v + (1 - β2) g²
        u = m̂ / (√v̂ + ε) + λ w                m̂ = m / (1 - β1ᵗ), v̂ = v / (1 - β2ᵗ), or m, v without ``bias_correction``
        w = w - η ‖w‖ / ‖u‖ u                 the trust ratio ‖w‖ / ‖u‖ is 1 where a norm is 0

    The paper, and NVIDIA's ``LAMBOptimizer`` for TensorFlow, take the trust ratio of every tensor: ``"all"``, which
    their ``FusedLAMB`` for PyTorch has as ``use_nvlamb=True``. Its default is ``"decayed"``: tensors without weight
    decay, biases and LayerNorm, move by plain η u. All defaults here are those of ``FusedLAMB``.

    What NVIDIA calls pre-normalization, clipping the gradient at a global norm of 1, is left to the caller, who alone
    knows whether the gradient is to be clipped once it is reduced, as in PyTorch, or each micro-batch's, as in
    TensorFlow: `training.loop.LoopOptions.clip`.

    The state of a parameter is ``step``, a float32 scalar on the CPU, and ``exp_avg`` and ``exp_avg_sq``, m and v.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        trust_ratio: TrustRatio = "decayed",
        bias_correction: bool = True,
        grad_averaging: bool = True,
    ) -> None:
        """Take the parameters: float32 or float64 master weights, and dense gradients of the same dtype.

        Raises:
            ValueError: an option is out of its range; the message names it.
        """
        if trust_ratio not in ("decayed", "all"):
            raise ValueError(f"trust_ratio is 'decayed' or 'all', not {trust_ratio!r}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas are from 0 to below 1, not {betas}")
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"{name} must not be below 0, as {value} is")
        # Every option belongs to a group: Horovod makes the optimizer again, from nothing but its groups.
        options = {"trust_ratio": trust_ratio, "bias_correction": bias_correction, "grad_averaging": grad_averaging}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay} | options)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the parameters that have a gradient; the update is left in the gradient's memory, as in FusedLAMB.

        Raises:
            TypeError: a parameter is of a dtype that small updates are lost in, or a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            of_age: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if (gradient := parameter.grad) is not None:
                    of_age[self._count_step(parameter, gradient)].append((parameter, gradient))
            for steps, pairs in of_age.items():
                self._update([parameter for parameter, _ in pairs], [gradient for _, gradient in pairs], steps, group)
        return loss

    def _count_step(self, parameter: torch.Tensor, gradient: torch.Tensor) -> int:
        """Count one more step of a parameter; its state is made at the first."""
        state = self.state[parameter]
        if not state:
            if parameter.dtype not in (torch.float32, torch.float64) or gradient.is_sparse:
                kind = "a sparse gradient" if gradient.is_sparse else parameter.dtype
                raise TypeError(f"LAMB takes float32 or float64 and dense gradients, not {kind}")
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        # On the CPU, wherever a checkpoint put it: to read it from a GPU would be to wait for the GPU.
        state["step"] = state["step"].cpu() + 1
        return int(state["step"])

    def _update(
        self, parameters: list[torch.Tensor], updates: list[torch.Tensor], steps: int, group: dict[str, Any]
    ) -> None:
        """Update parameters that all take the same step; ``updates`` are their gradients before, and their u after.

        Whole lists at once, which a GPU does in a few kernels.
        """
        beta1, beta2 = group["betas"]
        correction1, correction2 = 1 - beta1**steps, 1 - beta2**steps
        if not group["bias_correction"]:
            correction1 = correction2 = 1.0
        first = [self.state[parameter]["exp_avg"] for parameter in parameters]
        second = [self.state[parameter]["exp_avg_sq"] for parameter in parameters]

        if group["grad_averaging"]:
            torch._foreach_lerp_(first, updates, 1 - beta1)
        else:
            torch._foreach_mul_(first, beta1)
            torch._foreach_add_(first, updates)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, updates, updates, 1 - beta2)

        # The gradients are done with. To allocate as much memory at every step costs a CPU more than the arithmetic.
        torch._foreach_copy_(updates, second)
        torch._foreach_sqrt_(updates)
        torch._foreach_mul_(updates, correction1 / correction2**0.5)
        torch._foreach_add_(updates, correction1 * group["eps"])
        torch._foreach_reciprocal_(updates)
        torch._foreach_mul_(updates, first)
        if group["weight_decay"]:
            torch._foreach_add_(updates, parameters, alpha=group["weight_decay"])

        if group["trust_ratio"] == "decayed" and group["weight_decay"] == 0:
            torch._foreach_add_(parameters, updates, alpha=-group["lr"])
        else:
            weight_norms, update_norms = (torch.stack(torch._foreach_norm(each)) for each in (parameters, updates))
            ratios = torch.where((weight_norms > 0) & (update_norms > 0), weight_norms / update_norms, 1.0)
            torch._foreach_addcmul_(parameters, updates, ratios.unbind(), -group["lr"])


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters with weight decay, and those without: biases and LayerNorm, which are all that has one dimension.

    As in BERT's own optimizer (Devlin et al. 2018).
    """
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    plain = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def make_optimizer(
    name: OptimizerName, model: torch.nn.Module, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """The optimizer of a run: "adamw" of Loshchilov and Hutter 2017, or a LAMB with the recipe of NVIDIA's BERT.

    "lamb" is ``FusedLAMB`` as it comes, "nvlamb" the same with the trust ratio of all tensors.
    """
    groups = parameter_groups(model, weight_decay)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=learning_rate, fused=True)  # a third of the time on a CPU
    return Lamb(groups, lr=learning_rate, trust_ratio="all" if name == "nvlamb" else "decayed")
