"""The processes of one training run; the only importer of Horovod.

A job started by ``horovodrun -np N`` runs N processes; the same job started plainly runs alone and needs no Horovod.
With ``--host-discovery-script`` the run is *elastic*: processes may be lost and others may join between two steps.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch

from training.options import Compression

_T = TypeVar("_T")


class Workers(Protocol):
    """The processes of a run, as one of them sees them."""

    @property
    def rank(self) -> int:
        """Of this process, from 0."""

    @property
    def size(self) -> int:
        """Number of processes; an elastic run may change it whenever it is inside `run`."""

    @property
    def device(self) -> torch.device:
        """This process's GPU, or the CPU where there is none."""

    def wrap(self, optimizer: torch.optim.Optimizer, model: torch.nn.Module, compression: Compression) -> Any:
        """An optimizer whose gradients are summed over all processes while the last backward of a step still runs."""

    def begin_step(self, optimizer: Any, backwards: int) -> None:
        """Forget all gradients, and sum the next ones once, after so many backward passes on this process."""

    def reduced_gradients(self, optimizer: Any) -> Any:
        """A context in which the gradients are summed already and the optimizer may step."""

    def sum(self, values: Sequence[float], *, between_steps: bool = False) -> list[float]:
        """The sums of some numbers over all processes; ``between_steps`` lets an elastic run change its size here."""

    def gather(self, value: _T) -> list[_T]:
        """The picklable values of all processes, in order of rank, on each of them."""

    def share(self, value: _T) -> _T:
        """The picklable value of process 0, on every process."""

    def share_tensors(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of process 0, on every process's own device."""

    def run(self, synchronize: Callable[[], None], steps: Callable[[], _T]) -> _T:
        """Call ``synchronize``, which gives every process the state of process 0, and then ``steps``.

        An elastic run does both again whenever a process was lost or has joined; both must then hold no memory of the
        rank and the size they saw before. No collective operation may come before this one: a process that joins would
        take part in it alone.
        """


class Alone:
    """A run of one process, without Horovod; methods as in `Workers`."""

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
    """The processes that horovodrun started; methods as in `Workers`."""

    def __init__(self) -> None:
        import horovod.torch as hvd  # noqa: PLC0415 - a run of one process needs no Horovod

        hvd.init()
        self._hvd = hvd
        # The number of the GPU stays what it was at the start, whatever rank an elastic run gives this process later.
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
        # Clipping must see the summed gradients, so the wait comes before it and not inside step().
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
    """The processes of a run of ``horovodrun --host-discovery-script``, which may lose some and take new ones.

    Weights change only after the last sum of a step has arrived, so what a process holds in memory is always the whole
    state of a whole step, and no copy of it need be kept to go back to: after a loss, everyone continues from what the
    new process 0 has, which is the end of the last step or of the one before.
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
        # Horovod tells process 0 alone that hosts have come or gone; this way all leave the steps at the same place.
        changed, self._hosts_changed = self._hosts_changed, False
        *sums, changes = super().sum([*values, float(changed)])
        if changes:
            raise self._interrupt(False)
        return sums

    def run(self, synchronize: Callable[[], None], steps: Callable[[], _T]) -> _T:
        self._synchronize = synchronize
        result: _T = self._hvd.elastic.run(lambda _: steps())(self)
        return result

    # What hvd.elastic.run asks of its state object, which this is.

    def on_hosts_updated(self, timestamp: int, result: int) -> None:
        """Called on process 0, by a thread of Horovod's."""
        self._hosts_changed = True

    def restore(self) -> None:
        """Called where a process was lost, so in the middle of a step."""

    def on_reset(self) -> None:
        """Called when the processes that are left have found each other again."""

    def sync(self) -> None:
        """Called before the steps, at first and after every reset; a process that joins starts with this one."""
        if self._optimizer is not None:
            self._optimizer.load_state_dict(self._optimizer.state_dict())  # Horovod's drops the sums under way
        self._synchronize()


def start_workers() -> Workers:
    """Join the other processes of this run, or run alone where horovodrun did not start this one."""
    if os.environ.get("HOROVOD_ELASTIC") == "1":
        return ElasticWorkers()
    return HorovodWorkers() if "HOROVOD_RANK" in os.environ or "OMPI_COMM_WORLD_RANK" in os.environ else Alone()
