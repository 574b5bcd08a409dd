"""The processes of one training run; the only importer of Horovod.

A job started by ``horovodrun -np N`` runs N processes; the same job started plainly runs alone and needs no Horovod.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol, TypeVar

import torch

Compression = Literal["none", "fp16"]
_T = TypeVar("_T")


class Workers(Protocol):
    """The processes of a run, as one of them sees them."""

    rank: int  # of this process, from 0
    size: int  # number of processes
    local_rank: int  # of this process on its machine; also the number of its GPU

    def wrap(self, optimizer: torch.optim.Optimizer, model: torch.nn.Module, compression: Compression) -> Any:
        """An optimizer whose gradients are averaged over all processes while backward still runs."""

    def reduced_gradients(self, optimizer: Any) -> Any:
        """A context in which the gradients are averaged already and the optimizer may step."""

    def broadcast(self, model: torch.nn.Module) -> None:
        """Give every process the weights of process 0."""

    def mean(self, value: float) -> float:
        """The mean of a number over all processes."""

    def gather(self, value: _T) -> list[_T]:
        """The picklable values of all processes, in order of rank, on each of them."""


class Alone:
    """A run of one process, without Horovod; methods as in `Workers`."""

    rank = 0
    size = 1
    local_rank = 0

    def wrap(self, optimizer: torch.optim.Optimizer, model: torch.nn.Module, compression: Compression) -> Any:
        return optimizer

    @contextmanager
    def reduced_gradients(self, optimizer: Any) -> Iterator[None]:
        yield

    def broadcast(self, model: torch.nn.Module) -> None:
        pass

    def mean(self, value: float) -> float:
        return value

    def gather(self, value: _T) -> list[_T]:
        return [value]


class HorovodWorkers:
    """The processes that horovodrun started; methods as in `Workers`."""

    def __init__(self) -> None:
        import horovod.torch as hvd  # noqa: PLC0415 - a run of one process needs no Horovod

        hvd.init()
        self._hvd = hvd
        self.rank: int = hvd.rank()
        self.size: int = hvd.size()
        self.local_rank: int = hvd.local_rank()

    def wrap(self, optimizer: torch.optim.Optimizer, model: torch.nn.Module, compression: Compression) -> Any:
        return self._hvd.DistributedOptimizer(
            optimizer,
            named_parameters=model.named_parameters(),
            compression=getattr(self._hvd.Compression, compression),
        )

    @contextmanager
    def reduced_gradients(self, optimizer: Any) -> Iterator[None]:
        # Clipping must see the averaged gradients, so the wait comes before it and not inside step().
        optimizer.synchronize()
        with optimizer.skip_synchronize():
            yield

    def broadcast(self, model: torch.nn.Module) -> None:
        self._hvd.broadcast_parameters(model.state_dict(), root_rank=0)

    def mean(self, value: float) -> float:
        return float(self._hvd.allreduce(torch.tensor(value, dtype=torch.float64), op=self._hvd.Average))

    def gather(self, value: _T) -> list[_T]:
        gathered: list[_T] = self._hvd.allgather_object(value)
        return gathered


def start_workers() -> Workers:
    """Join the other processes of this run, or run alone where horovodrun did not start this one."""
    return HorovodWorkers() if "HOROVOD_RANK" in os.environ or "OMPI_COMM_WORLD_RANK" in os.environ else Alone()
