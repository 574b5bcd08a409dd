"""Queries about a model in Triton, for start-up, probes and operators; questions do not use this module."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2

from service.triton.errors import EngineBroken, EngineNotLoaded
from service.triton.failover import Failover
from service.triton.replica import Replica
from service.triton.wire import NOT_A_MESSAGE

CALLS_PER_WINDOW = 2
"""Concurrent engine calls for each window that the engine computes at one time: that one, and one in the queue."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model as Triton has loaded it."""

    parameters: Mapping[str, str]
    """Parameters in its ``config.pbtxt``."""
    concurrency: int
    """Windows to send at one time: twice the number that its instances at all addresses compute at one time."""


class EngineAdmin(Protocol):
    """Describes a loaded model version; `TritonAdmin` implements it. Deadlines are in `time.monotonic` seconds."""

    async def check_ready(self, *, deadline: float) -> None:
        """Check that the model can be called.

        Raises:
            EngineError: it cannot be called; the message says why.
        """
        ...

    async def loaded(self, *, deadline: float) -> Loaded:
        """Return what the server has loaded.

        Raises:
            EngineError: the server did not answer.
        """
        ...

    async def server_version(self, *, deadline: float) -> str:
        """Return the version of the server.

        Raises:
            EngineError: the server did not answer.
        """
        ...


class TritonAdmin:
    """The `EngineAdmin` of a model version in Triton; made by `service.triton.channels.Channels`."""

    def __init__(self, failover: Failover, replicas: Sequence[Replica]) -> None:
        self._failover = failover
        self._replicas = replicas

    async def check_ready(self, *, deadline: float) -> None:
        """Check that the model can be called, as described in `EngineAdmin`."""
        request = service_pb2.ModelReadyRequest(name=self._failover.model, version=self._failover.version)
        reply = await self._call("ModelReady", request, service_pb2.ModelReadyResponse, deadline)
        if not reply.ready:
            raise EngineNotLoaded(f"Triton runs, but {self._failover.description} is not ready.")

    async def loaded(self, *, deadline: float) -> Loaded:
        """Return what the server has loaded, as described in `EngineAdmin`."""
        request = service_pb2.ModelConfigRequest(name=self._failover.model, version=self._failover.version)
        reply = await self._call("ModelConfig", request, service_pb2.ModelConfigResponse, deadline)
        instances = sum(group.count * max(len(group.gpus), 1) for group in reply.config.instance_group)
        addresses = await asyncio.gather(*(replica.count_addresses() for replica in self._replicas))
        windows = max(instances, 1) * max(reply.config.max_batch_size, 1)
        parameters = {name: value.string_value for name, value in reply.config.parameters.items()}
        return Loaded(parameters, CALLS_PER_WINDOW * windows * sum(addresses))

    async def server_version(self, *, deadline: float) -> str:
        """Return the version of the next replica."""
        request = service_pb2.ServerMetadataRequest()
        reply = await self._call("ServerMetadata", request, service_pb2.ServerMetadataResponse, deadline)
        return str(reply.version)

    async def _call(self, method: str, request: Any, reply: Any, deadline: float) -> Any:
        return await self._failover.call(method, request.SerializeToString(), deadline, partial(_parse, reply))


def _parse(message: Any, reply: bytes) -> Any:
    try:
        return message.FromString(reply)
    except DecodeError:
        raise EngineBroken(NOT_A_MESSAGE) from None
