"""LAMB, an optimizer for large batches, and the choice between it and AdamW.

The norm of a tensor's step is the norm of the tensor times the learning rate, so that one rate suits all layers (You et
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

    The paper and NVIDIA's ``LAMBOptimizer`` for TensorFlow use the trust ratio for every tensor: ``"all"``, which is
    ``use_nvlamb=True`` in NVIDIA's ``FusedLAMB`` for PyTorch. The default of ``FusedLAMB`` is ``"decayed"``: tensors
    without weight decay (biases and LayerNorm) move by plain η u. All defaults here are those of ``FusedLAMB``.

    NVIDIA's pre-normalization, which clips the gradient at a global norm of 1, is left to the caller. Only the caller
    knows whether to clip the reduced gradient, as in PyTorch, or that of each micro-batch, as in TensorFlow:
    `training.loop.LoopOptions.clip`.

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
        """Bind the parameters: float32 or float64 master weights with dense gradients of the same dtype.

        Raises:
            ValueError: an option is out of range; the message names it.
        """
        if trust_ratio not in ("decayed", "all"):
            raise ValueError(f"trust_ratio must be 'decayed' or 'all', not {trust_ratio!r}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be at least 0 and below 1, not {betas}")
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"{name} must be at least 0, not {value}")
        # All options are stored in the groups, because Horovod recreates the optimizer from its groups alone.
        options = {"trust_ratio": trust_ratio, "bias_correction": bias_correction, "grad_averaging": grad_averaging}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay} | options)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the parameters that have a gradient; overwrites the gradient with the update, as FusedLAMB does.

        Raises:
            TypeError: a parameter has a dtype in which small updates are lost, or a gradient is sparse.
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
        """Count a step of a parameter; the first step creates its state."""
        state = self.state[parameter]
        if not state:
            if parameter.dtype not in (torch.float32, torch.float64) or gradient.is_sparse:
                kind = "a sparse gradient" if gradient.is_sparse else parameter.dtype
                raise TypeError(f"LAMB takes float32 or float64 and dense gradients, not {kind}")
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        # Kept on the CPU, wherever a checkpoint loaded it, because reading it from a GPU would wait for the GPU.
        state["step"] = state["step"].cpu() + 1
        return int(state["step"])

    def _update(
        self, parameters: list[torch.Tensor], updates: list[torch.Tensor], steps: int, group: dict[str, Any]
    ) -> None:
        """Update parameters that are at the same step; ``updates`` are the gradients on entry and u on return.

        Operates on whole lists, which takes only a few kernels on a GPU.
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

        # Reuse the gradients' memory: on a CPU, allocating it at every step costs more than the arithmetic.
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
    """Split the parameters by weight decay; biases and LayerNorm, which have one dimension, get none.

    This is the rule of BERT's own optimizer (Devlin et al. 2018).
    """
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    plain = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def make_optimizer(
    name: OptimizerName, model: torch.nn.Module, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Create the optimizer of a run: "adamw" of Loshchilov and Hutter 2017, or LAMB with the recipe of NVIDIA's BERT.

    "lamb" is ``FusedLAMB`` with its defaults; "nvlamb" also uses the trust ratio for all tensors.
    """
    groups = parameter_groups(model, weight_decay)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=learning_rate, fused=True)  # fused takes a third of the time on a CPU
    return Lamb(groups, lr=learning_rate, trust_ratio="all" if name == "nvlamb" else "decayed")
