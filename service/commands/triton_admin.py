"""Ask Triton servers what they have loaded, and how far they are."""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from service.settings import Settings
from service.triton.client import TritonModel, tls_credentials, tls_options

_CALL_S = 5.0


class RolloutFailed(Exception):
    """The new version did not come up or did not answer as it should; what answered before still does."""


@dataclass(frozen=True, slots=True)
class State:
    """What a Triton says of a version."""

    name: str  # READY, LOADING, UNLOADING or UNAVAILABLE
    reason: str = ""  # e.g. why it could not be loaded


UNKNOWN = State("UNAVAILABLE")


class Servers:
    """Every Triton that serves the repository; a name with several addresses stands for as many."""

    def __init__(self, urls: Sequence[str], tls: grpc.ChannelCredentials | None = None) -> None:
        """Look up the addresses.

        Args:
            urls: gRPC addresses host:port.
            tls: as `service.triton.client.tls_credentials` gives it; a certificate must have the name by which a server
                was looked up, not its address.

        Raises:
            RolloutFailed: one cannot be looked up.
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
        """End the connections."""
        for client in self._clients.values():
            client.close()

    def states(self, model: str, version: int) -> dict[str, State]:
        """What each server says of the version.

        Raises:
            RolloutFailed: one does not answer.
        """
        return {url: states.get((model, version), UNKNOWN) for url, states in self.all_states().items()}

    def all_states(self) -> dict[str, dict[tuple[str, int], State]]:
        """What each server says of every version that it knows, by model and version.

        Raises:
            RolloutFailed: one does not answer.
        """
        return {
            url: {
                (entry.name, int(entry.version)): State(entry.state, entry.reason)
                for entry in self._ask(url, "get_model_repository_index").models
                if entry.version
            }
            for url in self.urls
        }

    def answered(self, model: str, version: int) -> int:
        """Engine calls that the version has answered on all servers together; 0 on those that do not have it.

        Raises:
            RolloutFailed: one does not answer.
        """
        count = 0
        for url, state in self.states(model, version).items():
            if state.name == "READY":
                found = self._ask(url, "get_inference_statistics", model, str(version))
                count += sum(each.inference_count for each in found.model_stats)
        return count

    def versions(self) -> dict[str, str]:
        """The version of each Triton.

        Raises:
            RolloutFailed: one does not answer.
        """
        return {url: self._ask(url, "get_server_metadata").version for url in self.urls}

    def model(self, url: str, model: str, version: int) -> TritonModel:
        """A version of a model at one of the servers, for a running event loop."""
        return TritonModel([url], model=model, version=version, tls=self._tls, tls_name=self._names[url])

    def _ask(self, url: str, method: str, *arguments: str) -> Any:
        try:
            return getattr(self._clients[url], method)(*arguments, client_timeout=_CALL_S)
        except (InferenceServerException, grpc.RpcError) as error:
            over = " over TLS" if self._tls else ""
            raise RolloutFailed(
                f"Triton at {url} does not answer{over}: {error}; give its address with --triton-url"
            ) from None


def tls_of(settings: Settings) -> grpc.ChannelCredentials | None:
    """What the service would speak TLS to Triton with.

    Raises:
        RolloutFailed: a file cannot be read.
    """
    try:
        return tls_credentials(settings.triton_tls_ca, settings.triton_tls_cert, settings.triton_tls_key)
    except ValueError as error:
        raise RolloutFailed(str(error)) from None


def _host(url: str) -> str:
    return url.removeprefix("dns:///").rpartition(":")[0].strip("[]")


def _addresses(url: str) -> list[str]:
    host, _, port = url.removeprefix("dns:///").rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except (OSError, ValueError) as error:
        raise RolloutFailed(f"--triton-url {url}: {error}") from None
    addresses = dict.fromkeys(str(address[0]) for *_, address in found)
    if host == "localhost":  # one server with two addresses, and it may listen on one of them only
        return [url]
    return [f"[{address}]:{port}" if ":" in address else f"{address}:{port}" for address in addresses]
