"""The training loop of all jobs, independent of model and data.

The *global batch* of a step is a pure function of the step. Its gradient is that of the sum of its losses divided by
its number of targets, and each process computes a share of both. So a run on one, two or four processes has the same
loss curve, an elastic run may change the number of processes between two steps, and a resumed run needs no sampler
state.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from training.checkpoints import CheckpointError, State, collect, load_state, restore, save_state
from training.distributed import Workers
from training.lamb import make_optimizer
from training.metrics import Metrics, peak_flops, plot_loss
from training.options import LoopArguments, Precision
from training.schedules import linear, poly

LOSS_SCALE = 2.0**16
"""Initial dynamic loss scale of fp16; it halves at an overflow and doubles after 2000 steps without one."""
LOSS_SCALE_FLOOR = 1.0
"""Lowest loss scale; if gradients overflow here too, the run is aborted."""


class Batch(Protocol):
    """A micro-batch: a dataclass of tensors on the CPU, with sequences padded to one length."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def lengths(self) -> Sequence[int]:
        """Length of each sequence in tokens, without padding."""


_Item = TypeVar("_Item")
_Batch = TypeVar("_Batch", bound=Batch)


@dataclass(frozen=True, slots=True)
class Task(Generic[_Item, _Batch]):
    """What a job trains on, and how."""

    items: Callable[[int], Sequence[_Item]]
    """Maps a step to its global batch, ideally sorted by length: it is cut into micro-batches in this order."""
    collate: Callable[[Sequence[_Item]], _Batch]
    """Makes a batch on the CPU from some items; a pure function, called from a separate thread."""
    loss: Callable[[torch.nn.Module, _Batch], Tensor]
    """Computes the *sum* of each loss term over the batch's targets, float32 of shape (terms,)."""
    targets: Callable[[_Batch], Sequence[int]]
    """Returns the number of targets of each term; the loss is the weighted sum of the means over all targets."""
    flops: Callable[[_Batch], float]
    """Counts the FLOPs of forward and backward, for the MFU; see `training.encoders.bert_flops`."""
    terms: Mapping[str, float] = field(default_factory=lambda: {"loss": 1.0})
    """Name of each term in the metrics, and its weight in the loss; 0 for terms that are only reported."""
    evaluate: Callable[[], Mapping[str, float]] | None = None
    """Computes more numbers for a record on held-out data; called by all processes between two steps."""
    evaluate_every: int = 1
    """Steps between two evaluations; the last step is also followed by one."""


@dataclass(frozen=True, kw_only=True)
class LoopOptions(LoopArguments):
    """Settings of the loop; `identity` has those that must not change when a run is resumed."""

    steps: int  # optimizer steps of the whole run

    @classmethod
    def of(cls, args: LoopArguments, steps: int) -> "LoopOptions":
        """Take the settings of a run with the given number of steps from the options of a job."""
        return cls(steps=steps, **{field.name: getattr(args, field.name) for field in fields(LoopArguments)})

    def identity(self) -> dict[str, object]:
        """Return the settings that decide a step's result; a resume state with another identity is refused."""
        names = ("steps", "batch_size", "optimizer", "learning_rate", "warmup", "decay", "weight_decay")
        more = ("max_gradient_norm", "clip", "precision", "seed")
        return {name: getattr(self, name) for name in names + more}

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a step; steps count from 0."""
        schedule = linear if self.decay == "linear" else poly
        return self.learning_rate * schedule(step, self.steps, self.warmup)


def micro_batches(items: Sequence[_Item], largest: int | None, rank: int, size: int) -> list[Sequence[_Item]]:
    """Return one process's micro-batches of a global batch; all processes have the same number of them.

    The batch is cut in order into pieces whose sizes differ by at most one; micro-batch i of process r is piece
    ``i * size + r``. If ``largest`` divides the batch and the number of processes divides the number of pieces, the
    pieces are the same for any number of processes. With more processes than items, some pieces are empty.
    """
    rounds = max(-(-len(items) // ((largest or len(items)) * size)), 1)
    pieces = rounds * size
    bounds = [len(items) * piece // pieces for piece in range(pieces + 1)]
    return [items[bounds[piece] : bounds[piece + 1]] for piece in range(rank, pieces, size)]


def train(
    model: torch.nn.Module,
    task: Task[_Item, _Batch],
    options: LoopOptions,
    workers: Workers,
    output: Path,
    identity: dict[str, object],
) -> bool:
    """Train a model in place until the last step or a stop signal; resume from the run's saved state if there is one.

    SIGTERM or SIGINT to any process ends the run after the current step, with its state saved. No collective operation
    of ``workers`` may come before this function, see `Workers.run`.

    Args:
        model: model on the device of ``workers``, with fp32 parameters.
        task: what to train on.
        options: options of the loop.
        workers: the processes of the run.
        output: directory of the resume states, ``metrics.jsonl`` and ``loss.png``; only process 0 writes to it.
        identity: further settings that must be equal when the run is resumed.

    Returns:
        True if the run is complete, False if it was stopped.

    Raises:
        SystemExit: the loss is not finite, the loss scale reached its floor, or a state cannot be read or written.
    """
    return _Loop(model, task, options, workers, output, options.identity() | identity).run()


class _Loop(Generic[_Item, _Batch]):
    """The state of `train` between two steps."""

    def __init__(
        self,
        model: torch.nn.Module,
        task: Task[_Item, _Batch],
        options: LoopOptions,
        workers: Workers,
        output: Path,
        identity: dict[str, object],
    ) -> None:
        self.model, self.task, self.options, self.workers, self.output = model, task, options, workers, output
        self.identity = identity
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.forward: Any = torch.compile(model) if options.compile else model  # shares the parameters
        optimizer = make_optimizer(options.optimizer, model, options.learning_rate, options.weight_decay)
        self.optimizer = workers.wrap(optimizer, model, options.compression)  # has its own state with Horovod
        self.scaler = torch.amp.GradScaler(workers.device.type, LOSS_SCALE, enabled=options.precision == "fp16")
        self.step = self.saved = 0
        self.interval = _Interval(len(task.terms), workers.device)
        self.norm = torch.tensor(math.nan)  # gradient norm of the last step, before clipping
        self.signalled = False
        self.problem: str | None = None  # a file error on process 0; all processes then end together
        if workers.rank == 0:
            try:
                if state := load_state(output, identity):
                    self.resume(state)
                    self.saved = state.step
            except CheckpointError as error:
                self.problem = str(error)

    def run(self) -> bool:
        with _on_signals(self.stop):
            finished = self.workers.run(self.synchronize, self.steps)
        if self.signalled and not finished and self.workers.rank == 0:
            print(f"stopped after step {self.step} of {self.options.steps}; the same command resumes", flush=True)
        return finished

    def stop(self) -> None:
        self.signalled = True

    def resume(self, state: State) -> None:
        restore(self.model, self.optimizer, state.tensors)
        self.scaler.load_state_dict(dict(state.scaler))
        self.step = state.step

    def synchronize(self) -> None:
        """Copy the state of process 0 to every process."""
        self.end_if(self.workers.share(self.problem))
        step, self.saved, scaler = self.workers.share((self.step, self.saved, self.scaler.state_dict()))
        tensors = self.workers.share_tensors(collect(self.model, self.optimizer))
        if self.workers.rank:
            self.resume(State(step, tensors, scaler))

    def steps(self) -> bool:
        """Run the remaining steps; return True if that completes the run."""
        options, workers = self.options, self.workers
        peak = sum(workers.gather(peak_flops(workers.device, options.precision)))
        if not self.interval.steps:
            self.interval = _Interval(len(self.task.terms), workers.device)  # starts its clock
        self.model.train()
        with self.metrics() as metrics:
            for share in self.shares():
                *targets, stop = workers.sum([*share.targets, self.signalled], between_steps=True)
                if stop:
                    self.signalled = True
                    break
                losses = self.optimize(share, targets)
                self.interval.add(share, losses)
                self.step += 1
                if metrics:
                    metrics.advance()
                save = self.step % options.save_every == 0
                if save or self.step % options.log_every == 0 or self.evaluation_due():
                    self.log(peak, metrics)
                    if save:
                        self.save()
                    self.interval = _Interval(len(self.task.terms), workers.device)
            if self.interval.steps:
                self.log(peak, metrics)
            if self.step > self.saved:
                self.save()
        if workers.rank == 0 and not self.signalled:  # after a signal there may be little time
            plot_loss(self.output)
        return self.step >= options.steps

    def evaluation_due(self) -> bool:
        every = self.task.evaluate_every
        return self.task.evaluate is not None and (self.step % every == 0 or self.step == self.options.steps)

    def metrics(self) -> AbstractContextManager[Metrics | None]:
        """Open the metrics on process 0; the other processes report nothing."""
        if self.workers.rank:
            return nullcontext()
        return Metrics(self.output, self.step, self.options.steps, tensorboard=self.options.tensorboard)

    def shares(self) -> Iterator["_Share[_Batch]"]:
        """Yield this process's shares of the remaining steps; each is prepared while the previous one is computed."""
        last = min(self.options.steps, self.options.stop_after or self.options.steps)
        with ThreadPoolExecutor(1) as loader:
            steps = range(self.step, last)
            upcoming = [loader.submit(self.share, step) for step in steps[:1]]
            for step in steps:
                share = upcoming.pop().result()
                if step + 1 < last:
                    upcoming.append(loader.submit(self.share, step + 1))
                yield share

    def share(self, step: int) -> "_Share[_Batch]":
        """Prepare this process's share of a step and start its copy to the device."""
        rank, size = self.workers.rank, self.workers.size
        pieces = micro_batches(self.task.items(step), self.options.micro_batch_size, rank, size)
        batches = {rank + size * number: self.task.collate(piece) for number, piece in enumerate(pieces) if piece}
        targets = [self.task.targets(batch) for batch in batches.values()]
        lengths = [length for batch in batches.values() for length in batch.lengths]
        return _Share(
            batches={number: to_device(batch, self.workers.device) for number, batch in batches.items()},
            targets=[sum(counts) for counts in zip(*targets, strict=True)] or [0] * len(self.task.terms),
            counts=(len(lengths), sum(lengths), sum(self.task.flops(batch) for batch in batches.values())),
        )

    def optimize(self, share: "_Share[_Batch]", targets: Sequence[float]) -> Tensor:
        """Take one optimizer step, given the targets of all processes; return the loss sums of this process."""
        options, workers, optimizer, scaler = self.options, self.workers, self.optimizer, self.scaler
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate_at(self.step)
        workers.begin_step(optimizer, len(share.batches))
        losses = torch.zeros(len(targets), device=workers.device)
        for number, batch in share.batches.items():
            # Seeded by step and micro-batch, so that a resumed run draws the same numbers as an uninterrupted one.
            torch.manual_seed(((options.seed * 1_000_003 + self.step) * 65_537 + number) % 2**63)
            with autocast(options.precision, workers.device):
                sums = self.task.loss(self.forward, batch)
            losses += sums.detach()
            parts = zip(self.task.terms.values(), sums.unbind(), targets, strict=True)
            loss = scaler.scale(torch.stack([weight * term / max(count, 1.0) for weight, term, count in parts]).sum())
            if options.clip == "reduced":
                loss.backward()  # type: ignore[no-untyped-call]
            else:
                self.add_clipped(loss)
        with workers.reduced_gradients(optimizer):
            scaler.unscale_(optimizer)
            limit = options.max_gradient_norm if options.clip == "reduced" else math.inf
            self.norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit)
            scaler.step(optimizer)
        scaler.update()
        return losses

    def add_clipped(self, loss: Tensor) -> None:
        """Clip the gradient of one micro-batch's part of the loss, and add it to the gradient of the step."""
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True, materialize_grads=True)
        limit = self.options.max_gradient_norm * self.scaler.get_scale()
        share = (limit / (torch.nn.utils.get_total_norm(gradients) + 1e-6)).clamp(max=1.0)  # as in clip_grad_norm_
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            clipped = gradient * share
            parameter.grad = clipped if parameter.grad is None else parameter.grad.add_(clipped)

    def log(self, peak: float, metrics: Metrics | None) -> None:
        """Report the steps since the last record; end the run if the loss is not finite."""
        terms, interval = self.task.terms, self.interval
        sums = self.workers.sum([*interval.losses.tolist(), *interval.targets, *interval.counts])
        losses, targets, (sequences, tokens, flops) = sums[: len(terms)], sums[len(terms) : -3], sums[-3:]
        means = {name: loss / max(count, 1.0) for name, loss, count in zip(terms, losses, targets, strict=True)}
        loss = sum(terms[name] * mean for name, mean in means.items())
        scale = self.scaler.get_scale()
        if not math.isfinite(loss):
            self.end_if(f"step {self.step}: the loss is {loss}; lower --learning-rate, or use --precision fp32")
        if scale < LOSS_SCALE_FLOOR:
            self.end_if(
                f"step {self.step}: the gradients overflow at a loss scale of {scale} too; use --precision bf16"
            )
        seconds = time.monotonic() - interval.began
        evaluated: Mapping[str, float] = {}
        if self.task.evaluate and self.evaluation_due():  # on every process; its time is not counted
            evaluated = self.task.evaluate()
            self.model.train()
        if metrics is None:
            return
        record = {"loss": loss} | means | dict(evaluated)
        record |= {
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "gradient_norm": float(self.norm),
            "sequences_per_second": sequences / seconds,
            "tokens_per_second": tokens / seconds,
            "mfu": flops / seconds / peak,
            "processes": self.workers.size,
        }
        if self.scaler.is_enabled():
            record["loss_scale"] = scale
        metrics.write(self.step, record)

    def save(self) -> None:
        """Write the run's state; if process 0 cannot, all processes end."""
        if self.workers.rank == 0:
            state = State(self.step, collect(self.model, self.optimizer), self.scaler.state_dict())
            try:
                save_state(self.output, state, self.identity)
            except CheckpointError as error:
                self.problem = str(error)
        self.end_if(self.workers.share(self.problem))
        self.saved = self.step

    def end_if(self, problem: str | None) -> None:
        """End all processes if there is a problem; process 0 prints it."""
        if problem:
            raise SystemExit(problem if self.workers.rank == 0 else 1)


@dataclass(frozen=True, slots=True)
class _Share(Generic[_Batch]):
    """One process's share of a step."""

    batches: dict[int, _Batch]  # on the device, keyed by micro-batch number
    targets: list[int]  # number of targets of each term
    counts: tuple[float, float, float]  # sequences, tokens, FLOPs


class _Interval:
    """The sums of one process between two records."""

    def __init__(self, terms: int, device: torch.device) -> None:
        self.losses = torch.zeros(terms, dtype=torch.float64, device=device)  # only read, and so waited for, at the end
        self.targets = [0.0] * terms
        self.counts = [0.0, 0.0, 0.0]
        self.steps = 0
        self.began = time.monotonic()

    def add(self, share: _Share[Any], losses: Tensor) -> None:
        """Count a step."""
        self.losses += losses
        self.targets = [total + count for total, count in zip(self.targets, share.targets, strict=True)]
        self.counts = [total + count for total, count in zip(self.counts, share.counts, strict=True)]
        self.steps += 1


def to_device(batch: _Batch, device: torch.device) -> _Batch:
    """Copy a batch to a device; the copy to a GPU is asynchronous."""
    if device.type == "cpu":
        return batch
    tensors = {name: value for name in batch.__dataclass_fields__ if isinstance(value := getattr(batch, name), Tensor)}
    moved = {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in tensors.items()}
    return replace(batch, **moved)


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """Return the AMP context of a precision."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


@contextmanager
def _on_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Call ``stop`` on SIGTERM and SIGINT, instead of ending at once."""

    def handle(number: int, frame: FrameType | None) -> None:
        stop()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
