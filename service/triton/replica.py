"""One address of Triton: its gRPC channel, TLS, and the translation of gRPC errors."""

import asyncio
import socket
from collections import Counter
from pathlib import Path
from typing import TypeAlias

import grpc
import grpc.aio

from service.observability import tracing
from service.triton.errors import (
    EngineBroken,
    EngineError,
    EngineNotLoaded,
    EngineOverloaded,
    EngineTimeout,
    EngineUnavailable,
)

PASSED = "The deadline passed before the engine answered."

TlsCredentials: TypeAlias = grpc.ChannelCredentials
"""Certificates and key for connections to Triton, read by `tls_credentials`."""

_SERVICE = "/inference.GRPCInferenceService/"
_METHODS = ("ModelInfer", "ModelReady", "ModelConfig", "ServerMetadata")
_LOOKUP_S = 0.1  # longest wait for a name server, because questions may wait for the result
_CHANNEL_OPTIONS = (
    ("grpc.lb_policy_name", "round_robin"),  # use all addresses of a name; by default gRPC uses one
    # gRPC resolves a name again when a connection ends, but by default at most every 30 s. That is too late if all
    # replicas of a headless service are replaced.
    ("grpc.dns_min_time_between_resolutions_ms", 1000),
    # A restarted Triton is back in seconds, but the default backoff grows to two minutes, and an unanswered attempt to
    # connect lasts 20 s.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A server rejects more than one ping in five minutes with GOAWAY "too_many_pings". A dead peer is detected anyway:
    # keepalive also sets TCP_USER_TIMEOUT, here to 3 s, and every call has a deadline.
    ("grpc.keepalive_time_ms", 330_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.enable_http_proxy", 0),  # Triton is not behind a web proxy
    ("grpc.enable_retries", 0),  # our own retries respect the deadline and use other replicas
)
# Messages are a few kilobytes (three rows of at most 512 int32), far below gRPC's own limit of 4 MiB.


def tls_credentials(ca: str, cert: str = "", key: str = "") -> TlsCredentials | None:
    """Read PEM files for connections to Triton.

    Args:
        ca: certificates of the CA; empty: no encryption.
        cert: our own certificate, for mutual TLS.
        key: its private key.

    Raises:
        ValueError: a file cannot be read; the message names its setting.
    """
    if not ca:
        return None
    found: dict[str, bytes | None] = {}
    for name, path in (("CA", ca), ("CERT", cert), ("KEY", key)):
        try:
            found[name] = Path(path).read_bytes() if path else None
        except OSError as error:
            raise ValueError(f"BERTQA_TRITON_TLS_{name}: {path} cannot be read ({error.strerror})") from None
    return grpc.ssl_channel_credentials(found["CA"], found["KEY"], found["CERT"])


def tls_options(name: str) -> tuple[tuple[str, str], ...]:
    """Return channel options that require a name in the certificate of the server; default: that of the address."""
    return (("grpc.ssl_target_name_override", name),) if name else ()


class Replica:
    """A channel to one address host:port; the host name may have several addresses."""

    def __init__(self, url: str, tls: TlsCredentials | None = None, tls_name: str = "") -> None:
        """Open the channel, inside a running event loop; gRPC connects on first use."""
        self.url = url
        self._addresses = 1
        self._lookup: asyncio.Task[int] | None = None
        target = url if "://" in url else f"dns:///{url}"
        self._channel = (
            grpc.aio.secure_channel(target, tls, options=_CHANNEL_OPTIONS + tls_options(tls_name))
            if tls
            else grpc.aio.insecure_channel(target, options=_CHANNEL_OPTIONS)
        )
        # No serializers: requests and replies are bytes. With them, gRPC logs a traceback for each malformed reply.
        self._methods: dict[str, grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]] = {
            name: self._channel.unary_unary(_SERVICE + name) for name in _METHODS
        }

    async def call(self, method: str, request: bytes, timeout_s: float, model: str) -> bytes:
        """Call a method of Triton's gRPC service once.

        We pass no timeout to gRPC. It would convert it to wall-clock time and then to monotonic time; if the wall clock
        jumps in between, the call ends at once, or too late by the size of the jump.

        Args:
            method: one of `_METHODS`.
            request: serialized message.
            timeout_s: seconds after which the call is cancelled.
            model: description of the model, for messages.

        Returns:
            The serialized reply.

        Raises:
            EngineError: the call failed.
        """
        is_late = False

        def end() -> None:
            nonlocal is_late
            is_late = call.cancel()

        try:
            call = self._methods[method](request, metadata=tracing.metadata())
        except grpc.aio.UsageError as error:
            raise EngineUnavailable("The connection to Triton was closed.") from error
        timer = asyncio.get_running_loop().call_later(timeout_s, end)
        try:
            reply: bytes = await call
            return reply
        except asyncio.CancelledError:
            if is_late:
                raise EngineTimeout(PASSED) from None
            raise
        except grpc.aio.AioRpcError as error:
            raise translate(error, self.url, model) from error
        except grpc.aio.UsageError as error:
            raise EngineUnavailable("The connection to Triton was closed.") from error
        finally:
            timer.cancel()

    async def count_addresses(self) -> int:
        """Count the addresses of the name; returns the last count if the name server is slow."""
        lookup = self._lookup = self._lookup or asyncio.ensure_future(count_addresses(self.url))
        await asyncio.wait([lookup], timeout=_LOOKUP_S)
        if lookup.done() and not lookup.cancelled():
            self._addresses = lookup.result()
            if self._lookup is lookup:
                self._lookup = None
        return self._addresses

    async def close(self) -> None:
        """Close the channel; calls in progress fail."""
        if self._lookup:
            self._lookup.cancel()
            await asyncio.wait([self._lookup])
        await self._channel.close()


async def count_addresses(url: str) -> int:
    """Count the addresses of a URL's host; 1 if the system resolver does not know it."""
    host, _, port = url.removeprefix("dns:///").rpartition(":")
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except OSError:
        return 1
    return max(Counter(family for family, *_ in found).values())  # a server may have both an IPv4 and an IPv6 address


def translate(error: grpc.aio.AioRpcError, url: str, model: str) -> EngineError:
    """Translate a gRPC error into one of ours; ``model`` describes the model."""
    code, details = error.code(), (error.details() or "").strip()
    match code:
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return EngineTimeout(PASSED)
        case grpc.StatusCode.UNAVAILABLE if "maximum queue size" in details.lower():
            return EngineOverloaded(f"Triton's queue for {model} is full.")
        case grpc.StatusCode.UNAVAILABLE if "timeout expired" in details.lower():
            return EngineOverloaded(f"The request waited too long in Triton's queue for {model}.")
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.NOT_FOUND if "model" in details.lower():
            return EngineNotLoaded(f"Triton at {url} does not serve {model}: {details}")
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.CANCELLED:
            return EngineUnavailable(f"No connection to Triton at {url}: {details}")
        case _:
            return EngineBroken(f"The engine failed with {code.name}", detail=details)
