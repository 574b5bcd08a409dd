"""The gRPC connections of a process to Triton, and the clients that use them."""

import asyncio
from collections.abc import Sequence
from typing import Protocol

from bertqa.manifest import MODEL_NAME
from service.settings import Settings
from service.triton.admin import EngineAdmin, TritonAdmin
from service.triton.client import Engine, TritonEngine
from service.triton.failover import Failover, WatchCircuit
from service.triton.replica import Replica, TlsCredentials, tls_credentials


class EngineFactory(Protocol):
    """Makes the clients for a version of a model; `Channels` implements it."""

    def engine(self, model: str, version: int) -> Engine:
        """Make the client that computes logits."""
        ...

    def admin(self, model: str, version: int) -> EngineAdmin:
        """Make the client that describes the loaded version."""
        ...

    async def close(self) -> None:
        """Close the connections; calls in progress fail."""
        ...


class Channels:
    """One channel to each address of Triton; several addresses are replicas.

    Make one instance per process, inside its running event loop. Clients for the same version share circuit breakers.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        watch_circuit: WatchCircuit | None = None,
        tls: TlsCredentials | None = None,
        tls_name: str = "",
    ) -> None:
        """Open the channels; gRPC connects on first use.

        Args:
            urls: gRPC addresses host:port. Calls alternate between them, and between all addresses of a name. gRPC
                finds new replicas behind a name when a connection ends; ``--grpc-max-connection-age`` ends them
                regularly.
            watch_circuit: called with address, model and version of each new circuit breaker; returns a function to
                call with its later states.
            tls: from `tls_credentials`; None: no encryption.
            tls_name: name required in Triton's certificate; default: the name in the address.

        Raises:
            ValueError: ``urls`` is empty.
        """
        if not urls:
            raise ValueError("urls: at least one address host:port is needed")
        self._replicas = [Replica(url, tls, tls_name) for url in urls]
        self._watch_circuit = watch_circuit
        self._failovers: dict[tuple[str, str], Failover] = {}

    @classmethod
    def from_settings(cls, settings: Settings, *, watch_circuit: WatchCircuit | None = None) -> "Channels":
        """Open the channels that the settings describe.

        Raises:
            ValueError: a TLS file cannot be read; the message names its setting.
        """
        return cls(settings.triton_urls, watch_circuit=watch_circuit, tls=tls_from(settings))

    def engine(self, model: str = MODEL_NAME, version: int | None = None) -> TritonEngine:
        """Make the engine client for a version of a model; by default, the highest version that is loaded."""
        return TritonEngine(self._failover(model, version))

    def admin(self, model: str = MODEL_NAME, version: int | None = None) -> TritonAdmin:
        """Make the admin client for a version of a model; by default, the highest version that is loaded."""
        return TritonAdmin(self._failover(model, version), self._replicas)

    async def close(self) -> None:
        """Close the connections of all clients; calls in progress fail."""
        await asyncio.gather(*(replica.close() for replica in self._replicas))

    def _failover(self, model: str, version: int | None) -> Failover:
        key = model, str(version or "")
        if key not in self._failovers:
            self._failovers[key] = Failover(self._replicas, *key, self._watch_circuit)
        return self._failovers[key]


def tls_from(settings: Settings) -> TlsCredentials | None:
    """Read the TLS files that the settings name.

    Raises:
        ValueError: a file cannot be read; the message names its setting.
    """
    return tls_credentials(settings.triton_tls_ca, settings.triton_tls_cert, settings.triton_tls_key)
