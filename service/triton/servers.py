"""Query every Triton of a model repository, for operators: states, call counts and versions."""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from service.triton.channels import Channels
from service.triton.replica import TlsCredentials, tls_options

_CALL_S = 5.0


class ServerUnreachable(Exception):
    """A Triton does not answer, or its address cannot be resolved."""


@dataclass(frozen=True, slots=True)
class VersionState:
    """The state of a model version in a Triton."""

    name: str  # READY, LOADING, UNLOADING or UNAVAILABLE
    reason: str = ""  # e.g. why loading failed


UNKNOWN = VersionState("UNAVAILABLE")
"""State of a version that Triton does not know."""


class Servers:
    """All Tritons that serve the repository; each address of a name is one server."""

    def __init__(self, urls: Sequence[str], tls: TlsCredentials | None = None) -> None:
        """Resolve the addresses.

        Args:
            urls: gRPC addresses host:port.
            tls: from `service.triton.replica.tls_credentials`. The certificate must have the host name in ``urls``, not
                the resolved address.

        Raises:
            ServerUnreachable: an address cannot be resolved.
        """
        self._tls = tls
        self._names = {address: _host(url) for url in urls for address in _addresses(url)}
        self.urls = [*self._names]
        self._clients = {
            url: InferenceServerClient(
                url, creds=tls, channel_args=[("grpc.enable_http_proxy", 0), *(tls_options(name) if tls else ())]
            )
            for url, name in self._names.items()
        }

    def close(self) -> None:
        """Close the connections."""
        for client in self._clients.values():
            client.close()

    def states(self, model: str, version: int) -> dict[str, VersionState]:
        """Ask each server for the state of a version.

        Raises:
            ServerUnreachable: a server does not answer.
        """
        return {url: states.get((model, version), UNKNOWN) for url, states in self.all_states().items()}

    def all_states(self) -> dict[str, dict[tuple[str, int], VersionState]]:
        """Ask each server for the state of every version it knows, by model and version.

        Raises:
            ServerUnreachable: a server does not answer.
        """
        return {
            url: {
                (entry.name, int(entry.version)): VersionState(entry.state, entry.reason)
                for entry in self._ask(url, "get_model_repository_index").models
                if entry.version
            }
            for url in self.urls
        }

    def answered(self, model: str, version: int) -> int:
        """Count the engine calls that a version has answered on all servers; 0 where it is not loaded.

        Raises:
            ServerUnreachable: a server does not answer.
        """
        count = 0
        for url, state in self.states(model, version).items():
            if state.name == "READY":
                found = self._ask(url, "get_inference_statistics", model, str(version))
                count += sum(each.inference_count for each in found.model_stats)
        return count

    def versions(self) -> dict[str, str]:
        """Ask each server for its version.

        Raises:
            ServerUnreachable: a server does not answer.
        """
        return {url: self._ask(url, "get_server_metadata").version for url in self.urls}

    def channels(self, url: str) -> Channels:
        """Open channels to one server only, inside a running event loop."""
        return Channels([url], tls=self._tls, tls_name=self._names[url])

    def _ask(self, url: str, method: str, *arguments: str) -> Any:
        try:
            return getattr(self._clients[url], method)(*arguments, client_timeout=_CALL_S)
        except (InferenceServerException, grpc.RpcError) as error:
            over = " over TLS" if self._tls else ""
            raise ServerUnreachable(
                f"Triton at {url} does not answer{over}: {error}; give its address with --triton-url"
            ) from None


def _host(url: str) -> str:
    return url.removeprefix("dns:///").rpartition(":")[0].strip("[]")


def _addresses(url: str) -> list[str]:
    host, _, port = url.removeprefix("dns:///").rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except (OSError, ValueError) as error:
        raise ServerUnreachable(f"--triton-url {url}: {error}") from None
    addresses = dict.fromkeys(str(address[0]) for *_, address in found)
    if host == "localhost":  # one server with two addresses, which may listen on only one of them
        return [url]
    return [f"[{address}]:{port}" if ":" in address else f"{address}:{port}" for address in addresses]
