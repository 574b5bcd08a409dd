"""Coordinate the processes of a training run; the only module that imports Horovod.

``horovodrun -np N`` starts N processes; without it, a job runs in a single process and needs no Horovod. With
``--host-discovery-script`` the run is *elastic*: processes may be lost and others may join between two steps.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch

from training.options import Compression

_T = TypeVar("_T")


class Workers(Protocol):
    """The processes of a run, from the view of one of them."""

    @property
    def rank(self) -> int:
        """Rank of this process, from 0."""

    @property
    def size(self) -> int:
        """Number of processes; in an elastic run it may change inside `run`."""

    @property
    def device(self) -> torch.device:
        """This process's GPU, or the CPU if there is none."""

    def wrap(self, optimizer: torch.optim.Optimizer, model: torch.nn.Module, compression: Compression) -> Any:
        """Wrap an optimizer so that gradients are summed over all processes during the last backward of a step."""

    def begin_step(self, optimizer: Any, backwards: int) -> None:
        """Clear all gradients, and sum the next ones after the given number of backward passes on this process."""

    def reduced_gradients(self, optimizer: Any) -> Any:
        """Return a context in which the gradients are already summed and the optimizer may step."""

    def sum(self, values: Sequence[float], *, between_steps: bool = False) -> list[float]:
        """Sum numbers over all processes; with ``between_steps`` an elastic run may change its size here."""

    def gather(self, value: _T) -> list[_T]:
        """Return the values of all processes, in order of rank, on every process; values must be picklable."""

    def share(self, value: _T) -> _T:
        """Return the value of process 0 on every process; it must be picklable."""

    def share_tensors(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the tensors of process 0 on every process, on its own device."""

    def run(self, synchronize: Callable[[], None], steps: Callable[[], _T]) -> _T:
        """Call ``synchronize``, which copies the state of process 0 to every process, and then ``steps``.

        An elastic run calls both again whenever a process is lost or joins, so they must not keep an earlier rank or
        size. No collective operation may come before this call, because a joining process would be alone in it.
        """


class Alone:
    """A single process without Horovod; implements `Workers`."""

    rank = 0
    size = 1
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def wrap(self, optimizer: torch.optim.Optimizer, model: torch.nn.Module, compression: Compression) -> Any:
        return optimizer

    def begin_step(self, optimizer: Any, backwards: int) -> None:
        optimizer.zero_grad()

    @contextmanager
    def reduced_gradients(self, optimizer: Any) -> Iterator[None]:
        yield

    def sum(self, values: Sequence[float], *, between_steps: bool = False) -> list[float]:
        return list(values)

    def gather(self, value: _T) -> list[_T]:
        return [value]

    def share(self, value: _T) -> _T:
        return value

    def share_tensors(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return tensors

    def run(self, synchronize: Callable[[], None], steps: Callable[[], _T]) -> _T:
        synchronize()
        return steps()


class HorovodWorkers:
    """The processes that horovodrun started; implements `Workers`."""

    def __init__(self) -> None:
        import horovod.torch as hvd  # noqa: PLC0415 - a run of one process needs no Horovod

        hvd.init()
        self._hvd = hvd
        # The GPU index stays fixed, even if an elastic run gives this process another rank later.
        self.device = torch.device("cuda", hvd.local_rank()) if torch.cuda.is_available() else torch.device("cpu")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    @property
    def rank(self) -> int:
        rank: int = self._hvd.rank()
        return rank

    @property
    def size(self) -> int:
        size: int = self._hvd.size()
        return size

    def wrap(self, optimizer: torch.optim.Optimizer, model: torch.nn.Module, compression: Compression) -> Any:
        return self._hvd.DistributedOptimizer(
            optimizer,
            named_parameters=model.named_parameters(),
            compression=getattr(self._hvd.Compression, compression),
            op=self._hvd.Sum,
        )

    def begin_step(self, optimizer: Any, backwards: int) -> None:
        if optimizer.backward_passes_per_step != backwards:
            optimizer.set_backward_passes_per_step(backwards)
        optimizer.zero_grad()

    @contextmanager
    def reduced_gradients(self, optimizer: Any) -> Iterator[None]:
        # Clipping needs the summed gradients, so the wait comes before it and not inside step().
        optimizer.synchronize()
        with optimizer.skip_synchronize():
            yield

    def sum(self, values: Sequence[float], *, between_steps: bool = False) -> list[float]:
        numbers = torch.tensor(values, dtype=torch.float64)
        reduced: list[float] = self._hvd.allreduce(numbers, op=self._hvd.Sum, name="sum").tolist()
        return reduced

    def gather(self, value: _T) -> list[_T]:
        gathered: list[_T] = self._hvd.allgather_object(value)
        return gathered

    def share(self, value: _T) -> _T:
        shared: _T = self._hvd.broadcast_object(value, root_rank=0)
        return shared

    def share_tensors(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        described = self.share({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()})
        if self.rank:
            tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in described.items()}
        tensors = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        handles = [self._hvd.broadcast_async_(tensor.reshape(-1), 0, name=name) for name, tensor in tensors.items()]
        for handle in handles:
            self._hvd.synchronize(handle)
        return tensors

    def run(self, synchronize: Callable[[], None], steps: Callable[[], _T]) -> _T:
        synchronize()
        return steps()


class ElasticWorkers(HorovodWorkers):
    """The processes of an elastic run, started by ``horovodrun --host-discovery-script``.

    Weights change only after the last sum of a step has arrived, so each process's memory always has the complete state
    after some step, and no backup copy is needed. After a loss, all processes continue from the state of the new
    process 0, which is the end of the last step or of the one before.
    """

    def __init__(self) -> None:
        from horovod.common.exceptions import HostsUpdatedInterrupt  # noqa: PLC0415

        super().__init__()
        self._interrupt = HostsUpdatedInterrupt
        self._optimizer: Any = None
        self._synchronize: Callable[[], None] = lambda: None
        self._hosts_changed = False

    def wrap(self, optimizer: torch.optim.Optimizer, model: torch.nn.Module, compression: Compression) -> Any:
        self._optimizer = super().wrap(optimizer, model, compression)
        return self._optimizer

    def sum(self, values: Sequence[float], *, between_steps: bool = False) -> list[float]:
        if not between_steps:
            return super().sum(values)
        # Horovod notifies only process 0 of host changes; this way all processes leave at the same step.
        changed, self._hosts_changed = self._hosts_changed, False
        *sums, changes = super().sum([*values, float(changed)])
        if changes:
            raise self._interrupt(False)
        return sums

    def run(self, synchronize: Callable[[], None], steps: Callable[[], _T]) -> _T:
        self._synchronize = synchronize
        result: _T = self._hvd.elastic.run(lambda _: steps())(self)
        return result

    # The methods below are the interface that hvd.elastic.run needs from its state object.

    def on_hosts_updated(self, timestamp: int, result: int) -> None:
        """Record a host change; a Horovod thread calls this on process 0."""
        self._hosts_changed = True

    def restore(self) -> None:
        """Go back to a whole step; called after a process was lost, in the middle of a step."""

    def on_reset(self) -> None:
        """Reset after the remaining processes have reconnected."""

    def sync(self) -> None:
        """Synchronize before the steps, at the start and after every reset; a joining process starts here."""
        if self._optimizer is not None:
            self._optimizer.load_state_dict(self._optimizer.state_dict())  # Horovod drops pending sums
        self._synchronize()


def start_workers() -> Workers:
    """Join the other processes of this run, or run alone if horovodrun did not start this process."""
    if os.environ.get("HOROVOD_ELASTIC") == "1":
        return ElasticWorkers()
    return HorovodWorkers() if "HOROVOD_RANK" in os.environ or "OMPI_COMM_WORLD_RANK" in os.environ else Alone()
