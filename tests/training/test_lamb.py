"""Test LAMB against the paper's formulas in numpy, tensor by tensor, and against the moments of PyTorch's Adam."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.nn.utils import get_total_norm
from transformers import BertConfig, BertForPreTraining, BertForQuestionAnswering, BertForSequenceClassification

from bertqa.cli.command import parse
from tests.support.paths import ROOT
from training.checkpoints import collect, restore
from training.distributed import Alone
from training.lamb import Lamb, make_optimizer, parameter_groups
from training.loop import LoopOptions, Task, train
from training.options import LoopArguments

Array = NDArray[np.float64]

# A linear regression whose gradients are clipped at some steps and not at others; all numbers are exact in binary.
INPUTS = np.array([[2, -1, 1], [1, 3, -2], [-1, 1, 2], [3, 0, 1], [0, -2, 1], [1, 1, 1], [-2, 2, 0], [1, -1, -1]]) / 2
WANTED = np.array([[1, 0], [-2, 3], [4, 1], [0, 2], [1, -3], [2, 2], [-1, 0], [0, 1]]) / 2
START = {"weight": np.array([[0.5, -0.25, 0.125], [-0.75, 0.5, 0.25]]), "bias": np.array([0.25, -0.5])}
STEPS, LEARNING_RATE, WEIGHT_DECAY, MAX_NORM, MICRO_BATCH = 12, 0.125, 0.0625, 1.0, 2

VARIANTS: dict[str, dict[str, Any]] = {
    "NVIDIA PyTorch": {},
    "NVIDIA PyTorch, use_nvlamb": {"trust_ratio": "all"},
    "NVIDIA TensorFlow": {"trust_ratio": "all", "clip": "micro-batch"},
    "NVIDIA PyTorch, each micro-batch clipped": {"clip": "micro-batch"},
    "no bias correction": {"bias_correction": False},
    "no gradient averaging": {"grad_averaging": False, "trust_ratio": "all"},
    "neither": {"bias_correction": False, "grad_averaging": False},
}


class Reference:
    """LAMB in numpy, one tensor after the other."""

    def __init__(
        self,
        weights: Mapping[str, Array],
        weight_decay: Mapping[str, float],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        trust_ratio: str = "decayed",
        bias_correction: bool = True,
        grad_averaging: bool = True,
    ) -> None:
        self.weights = {name: np.array(weight, np.float64) for name, weight in weights.items()}
        self.weight_decay, self.eps, (self.beta1, self.beta2) = weight_decay, eps, betas
        self.trust_ratio, self.bias_correction, self.grad_averaging = trust_ratio, bias_correction, grad_averaging
        self.m = {name: np.zeros_like(weight) for name, weight in self.weights.items()}
        self.v = {name: np.zeros_like(weight) for name, weight in self.weights.items()}
        self.t = dict.fromkeys(self.weights, 0)

    def step(self, gradients: Mapping[str, Array], learning_rate: float) -> None:
        for name, g in gradients.items():
            w, decay = self.weights[name], self.weight_decay[name]
            self.t[name] += 1
            self.m[name] = self.beta1 * self.m[name] + (1 - self.beta1 if self.grad_averaging else 1) * g
            self.v[name] = self.beta2 * self.v[name] + (1 - self.beta2) * g * g
            m_hat, v_hat = self.m[name], self.v[name]
            if self.bias_correction:
                m_hat = m_hat / (1 - self.beta1 ** self.t[name])
                v_hat = v_hat / (1 - self.beta2 ** self.t[name])
            update = m_hat / (np.sqrt(v_hat) + self.eps) + decay * w
            ratio = 1.0
            if self.trust_ratio == "all" or decay != 0:
                weight_norm, update_norm = np.sqrt(np.sum(w**2)), np.sqrt(np.sum(update**2))
                if weight_norm != 0 and update_norm != 0:
                    ratio = weight_norm / update_norm
            self.weights[name] = w - learning_rate * ratio * update


def regression(dtype: torch.dtype) -> torch.nn.Linear:
    model = torch.nn.Linear(3, 2, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(START[name]))
    return model


def weights_of(model: torch.nn.Module) -> list[float]:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).tolist()


def gradients_of(model: torch.nn.Module, rows: slice) -> list[torch.Tensor]:
    """Of half the squared error of some rows, summed over them and divided by the number of all rows."""
    dtype = next(model.parameters()).dtype
    error = model(torch.tensor(INPUTS[rows], dtype=dtype)) - torch.tensor(WANTED[rows], dtype=dtype)
    return list(torch.autograd.grad(error.square().sum() / 2 / len(INPUTS), list(model.parameters())))


def clipped(gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    return [gradient / max(float(get_total_norm(gradients)) / MAX_NORM, 1.0) for gradient in gradients]


def trajectory(variant: Mapping[str, Any]) -> list[list[float]]:
    """The weights, then the biases, after each step of the regression: LAMB by what `torch.optim.Adam` does.

    Adam with a learning rate of 1 moves a tensor by the direction of which LAMB only sets the length. It has neither of
    NVIDIA's options: without bias correction the direction is made of Adam's moments, and without gradient averaging
    the first moment lacks a factor.
    """
    model = regression(torch.float64)
    adam = torch.optim.Adam(model.parameters(), lr=1.0, eps=1e-6)
    found = []
    for step in range(STEPS):
        if variant.get("clip") == "micro-batch":
            batches = [slice(begin, begin + MICRO_BATCH) for begin in range(0, len(INPUTS), MICRO_BATCH)]
            parts = [clipped(gradients_of(model, rows)) for rows in batches]
            gradients = [sum(tensors, torch.zeros(())) for tensors in zip(*parts, strict=True)]
        else:
            gradients = clipped(gradients_of(model, slice(None)))
        before = [parameter.detach().clone() for parameter in model.parameters()]
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        adam.step()
        for parameter, weight, decay in zip(model.parameters(), before, (WEIGHT_DECAY, 0.0), strict=True):
            direction = weight - parameter.detach()
            if not variant.get("bias_correction", True):
                direction = adam.state[parameter]["exp_avg"] / (adam.state[parameter]["exp_avg_sq"].sqrt() + 1e-6)
            if not variant.get("grad_averaging", True):
                direction = direction / (1 - 0.9)
            update = direction + decay * weight
            has_ratio = variant.get("trust_ratio") == "all" or decay > 0
            ratio = weight.norm() / update.norm() if has_ratio else 1.0
            with torch.no_grad():
                parameter.copy_(weight - LEARNING_RATE * (1 - step / STEPS) ** 0.5 * ratio * update)
        found.append(weights_of(model))
    return found


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", [name for name in VARIANTS if VARIANTS[name].get("clip") != "micro-batch"])
def test_every_variant_goes_where_adam_goes_by_the_length_of_the_weights(
    name: str, dtype: torch.dtype, tolerance: float
) -> None:
    model = regression(dtype)
    optimizer = Lamb(parameter_groups(model, WEIGHT_DECAY), **VARIANTS[name])
    for step, expected in enumerate(trajectory(VARIANTS[name])):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - step / STEPS) ** 0.5
        for parameter, gradient in zip(model.parameters(), clipped(gradients_of(model, slice(None))), strict=True):
            parameter.grad = gradient
        optimizer.step()
        np.testing.assert_allclose(weights_of(model), expected, atol=tolerance)


def test_the_variants_are_all_different() -> None:
    ends = [trajectory(variant)[-1] for variant in VARIANTS.values()]
    assert all(np.abs(np.subtract(one, other)).max() > 0.003 for one in ends for other in ends if one is not other)


@dataclass(frozen=True)
class Rows:
    """Some rows of the regression, as a batch of the training loop."""

    rows: Sequence[int]

    @property
    def lengths(self) -> Sequence[int]:
        return [1] * len(self.rows)

    def to(self, device: torch.device) -> "Rows":
        return self


def squared_error(model: torch.nn.Module, batch: Rows) -> torch.Tensor:
    inputs, wanted = (torch.tensor(array[batch.rows], dtype=torch.float32) for array in (INPUTS, WANTED))
    error: torch.Tensor = model(inputs) - wanted
    return error.square().sum()[None] / 2


@pytest.mark.parametrize(
    ("optimizer", "clip", "name"),
    [
        ("lamb", "reduced", "NVIDIA PyTorch"),
        ("nvlamb", "reduced", "NVIDIA PyTorch, use_nvlamb"),
        ("nvlamb", "micro-batch", "NVIDIA TensorFlow"),
        ("lamb", "micro-batch", "NVIDIA PyTorch, each micro-batch clipped"),
    ],
)
def test_the_training_loop_clips_where_each_implementation_does(
    optimizer: str, clip: str, name: str, tmp_path: Path
) -> None:
    flags = ["--optimizer", optimizer, "--clip", clip, "--decay", "poly", "--warmup", "0", "--precision", "fp32"]
    flags += ["--batch-size", str(len(INPUTS)), "--micro-batch-size", str(MICRO_BATCH)]
    flags += ["--learning-rate", str(LEARNING_RATE), "--weight-decay", str(WEIGHT_DECAY)]
    model = regression(torch.float32)
    task = Task(
        items=lambda step: range(len(INPUTS)),
        collate=Rows,
        loss=squared_error,
        targets=lambda batch: [len(batch.rows)],
        flops=lambda batch: 1.0,
    )
    assert train(model, task, LoopOptions.of(parse(LoopArguments, flags), STEPS), Alone(), tmp_path, {})
    np.testing.assert_allclose(weights_of(model), trajectory(VARIANTS[name])[-1], atol=1e-4)


@st.composite
def problems(draw: st.DrawFn) -> tuple[dict[str, Array], list[dict[str, Array]], dict[str, Any]]:
    """Some tensors, the gradients of some steps, of which not every tensor has one each time, and options."""
    shapes = draw(st.lists(st.lists(st.integers(1, 5), min_size=0, max_size=3), min_size=1, max_size=4))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    size = draw(st.sampled_from([0.0, 1e-6, 1e-2, 10.0]))
    weights = {f"w{number}": random.normal(0, 1, shape) for number, shape in enumerate(shapes)}
    steps = [
        {name: size * random.normal(0, 1, weight.shape) for name, weight in weights.items() if random.random() < 0.8}
        for _ in range(draw(st.integers(1, 12)))
    ]
    options = {
        "lr": draw(st.sampled_from([0.0, 1e-3, 0.1])),
        "betas": (draw(st.sampled_from([0.0, 0.9])), draw(st.sampled_from([0.0, 0.98, 0.999]))),
        "eps": draw(st.sampled_from([1e-8, 1e-6, 1e-2])),
        "trust_ratio": draw(st.sampled_from(["decayed", "all"])),
        "bias_correction": draw(st.booleans()),
        "grad_averaging": draw(st.booleans()),
    }
    return weights, steps, options


@settings(deadline=None)
@given(problem=problems(), weight_decay=st.sampled_from([0.0, 0.01, 0.5]))
def test_lamb_agrees_with_the_reference(
    problem: tuple[dict[str, Array], list[dict[str, Array]], dict[str, Any]], weight_decay: float
) -> None:
    weights, steps, options = problem
    decays = {name: weight_decay if number % 2 else 0.0 for number, name in enumerate(weights)}
    parameters = {name: torch.nn.Parameter(torch.tensor(weight)) for name, weight in weights.items()}
    groups = [{"params": [parameters[name]], "weight_decay": decay} for name, decay in decays.items()]
    optimizer = Lamb(groups, **options)
    reference = Reference(weights, decays, **{name: value for name, value in options.items() if name != "lr"})
    for gradients in steps:
        optimizer.zero_grad()
        for name, gradient in gradients.items():
            parameters[name].grad = torch.tensor(gradient)
        optimizer.step()
        reference.step(gradients, options["lr"])
        for name, parameter in parameters.items():
            np.testing.assert_allclose(parameter.detach().numpy(), reference.weights[name], rtol=1e-7, atol=1e-9)


def test_tensors_of_one_group_may_have_taken_different_numbers_of_steps() -> None:
    start = {"early": np.array([1.0, -2.0]), "late": np.array([0.5, 3.0])}
    parameters = {name: torch.nn.Parameter(torch.tensor(weight)) for name, weight in start.items()}
    optimizer, reference = Lamb(parameters.values(), lr=0.1), Reference(start, dict.fromkeys(start, 0.01))
    for step in range(5):
        gradients = {name: np.array([0.3, -0.1 * step]) for name in start if name == "early" or step >= 2}
        optimizer.zero_grad()
        for name, gradient in gradients.items():
            parameters[name].grad = torch.tensor(gradient)
        optimizer.step()
        reference.step(gradients, 0.1)
    assert [float(optimizer.state[parameter]["step"]) for parameter in parameters.values()] == [5, 3]
    for name, parameter in parameters.items():
        np.testing.assert_allclose(parameter.detach().numpy(), reference.weights[name], rtol=1e-12)


def after_one_step(weights: Sequence[float], gradient: Sequence[float], **options: Any) -> torch.Tensor:
    parameter = torch.nn.Parameter(torch.tensor(weights))
    parameter.grad = torch.tensor(gradient)
    Lamb([parameter], **options).step()
    return parameter.detach()


def test_weights_of_zero_move_by_the_learning_rate() -> None:
    assert after_one_step([0.0, 0.0], [3.0, -5.0], lr=0.1).tolist() == pytest.approx([-0.1, 0.1], rel=1e-5)


def test_an_update_of_zero_leaves_the_weights() -> None:
    assert after_one_step([1.0, -2.0], [0.0, 0.0], lr=0.1, weight_decay=0.0, trust_ratio="all").tolist() == [1.0, -2.0]


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("trust_ratio", ["decayed", "all"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_a_gradient_that_is_no_number_is_seen_in_the_weights(
    broken: float, trust_ratio: str, weight_decay: float
) -> None:
    after = after_one_step([1.0, 2.0], [0.5, broken], trust_ratio=trust_ratio, weight_decay=weight_decay)
    assert not torch.isfinite(after).all()


def test_the_loss_scaler_skips_a_step_that_overflows_and_no_other() -> None:
    def trained(scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        optimizer = Lamb([parameter], lr=0.1)
        scaler = torch.amp.GradScaler("cpu", scale, enabled=scale != 1)
        for gradient in (0.5, float("inf"), 0.25):
            if scale == 1 and gradient == float("inf"):
                continue
            scaler.scale(torch.tensor(1.0))  # makes the scale
            parameter.grad = torch.full((2,), gradient) * scaler.get_scale()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        return parameter.detach(), optimizer.state[parameter]["step"]

    (scaled, steps), (plain, _) = trained(2.0**16), trained(1)
    assert torch.equal(scaled, plain)
    assert steps == 2


@pytest.mark.parametrize("name", ["adamw", "lamb", "nvlamb"])
def test_a_restored_optimizer_goes_on_bit_for_bit(name: str) -> None:
    def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for number in numbers:
            optimizer.zero_grad()
            model(torch.tensor([[1.0, number, -1.0]])).square().sum().backward()
            optimizer.step()

    whole, half, other = (regression(torch.float32) for _ in range(3))
    optimizers = [make_optimizer(name, model, 0.1, 0.01) for model in (whole, half, other)]  # type: ignore[arg-type]
    steps(whole, optimizers[0], range(6))
    steps(half, optimizers[1], range(3))
    saved = {entry: tensor.clone() for entry, tensor in collect(half, optimizers[1]).items()}
    restore(other, optimizers[2], saved)
    steps(other, optimizers[2], range(3, 6))
    assert {"step/bias", "exp_avg/weight", "exp_avg_sq/weight"} < saved.keys()
    assert weights_of(other) == weights_of(whole)


def test_horovods_optimizer_keeps_every_option() -> None:
    # In a process of its own: Horovod's threads end with it.
    program = """
import horovod.torch as hvd, torch
from training.lamb import Lamb, make_optimizer, parameter_groups
hvd.init()
for kind in ("plain", "nvlamb", "adamw"):
    models = [torch.nn.Linear(3, 2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [
        Lamb(parameter_groups(model, 0.1), lr=0.1, betas=(0.5, 0.7), eps=0.1, trust_ratio="all", bias_correction=False,
             grad_averaging=False) if kind == "plain" else make_optimizer(kind, model, 0.1, 0.1)
        for model in models
    ]
    optimizers[1] = hvd.DistributedOptimizer(optimizers[1], named_parameters=models[1].named_parameters(), op=hvd.Sum)
    for step in range(4):
        for model, optimizer in zip(models, optimizers):
            optimizer.zero_grad()
            model(torch.tensor([[1.0, step, -1.0]])).square().sum().backward()
            optimizer.step()
    for one, other in zip(*(model.parameters() for model in models)):
        assert torch.equal(one, other), (kind, one, other)
print("equal")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout == "equal\n", done.stdout + done.stderr


@pytest.mark.parametrize("kind", [BertForPreTraining, BertForQuestionAnswering, BertForSequenceClassification])
def test_biases_and_layer_norm_have_no_weight_decay(kind: type[torch.nn.Module]) -> None:
    config = BertConfig(vocab_size=32, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    model = kind(config)
    decayed, plain = parameter_groups(model, 0.01)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.01, 0.0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert {names[parameter] for parameter in plain["params"]} == {
        name for name in names.values() if name.endswith((".bias", "LayerNorm.weight"))
    }
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


def test_a_closure_is_called_with_gradients_enabled() -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = Lamb([parameter])

    def closure() -> float:
        loss = parameter.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    assert optimizer.step(closure) == 1.0
    assert float(parameter.detach()) < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trust_ratio": "some"}, "trust_ratio must be 'decayed' or 'all', not 'some'"),
        ({"betas": (0.9, 1.0)}, "betas must be at least 0 and below 1"),
        ({"lr": -1.0}, "lr must be at least 0, not -1.0"),
        ({"eps": float("nan")}, "eps must be at least 0, not nan"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Lamb([torch.nn.Parameter(torch.zeros(1))], **options)


def test_weights_that_would_lose_small_updates_are_refused() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    parameter.grad = torch.ones(1, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"float32 or float64 and dense gradients, not torch\.bfloat16"):
        Lamb([parameter]).step()
    sparse = torch.nn.Embedding(4, 2, sparse=True)
    sparse(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="not a sparse gradient"):
        Lamb(sparse.parameters()).step()
