"""The seam to the engine: windows in, start and end logits out, over Triton's gRPC API.

What can go wrong is one small tree, and every gRPC error is translated into it once, in `_translate`::

    ModelError
    ├── ModelUnavailable    no connection, or not asked because there was none a moment ago
    │   └── ModelNotLoaded  the server answers, but has not loaded the model
    ├── ModelTimeout        the deadline passed
    ├── ModelOverloaded     too much waits for it, here or in Triton
    └── ModelBroken         the engine failed, or its output is not usable

What fails several times in a row is left alone: each version at each address has a `circuit_breaker.Circuit`.

Requests are written as protobuf messages straight onto ``grpc.aio``: ``tritonclient``'s own asyncio client takes about
an eighth more CPU per call, and gives the status code as text.
"""

import asyncio
import copy
import random
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Protocol, TypeVar

import grpc
import grpc.aio
import numpy as np
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2

from bertqa.manifest import MODEL_NAME
from bertqa.spans import FloatArray, Logits, are_real
from bertqa.windows import INPUT_NAMES, OUTPUT_NAMES, Window
from service.observability import tracing
from service.triton.circuit_breaker import TRIAL_S, Circuit, State

CALLS_PER_WINDOW = 2
"""Engine calls at one time for each window that the engine computes at one time: that one, and one that lies ready."""
_LOOKUP_S = 0.1  # that the name server may hold up a look at the loaded engine, and with it questions

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Id of the request being answered; it is sent along, so that Triton's log and traces name it."""

_SERVICE = "/inference.GRPCInferenceService/"
_RETRIES = 2
_RETRY_S = 0.1  # mean wait before the first retry; doubled for the next
_CHANNEL_OPTIONS = (
    ("grpc.lb_policy_name", "round_robin"),  # over all addresses of a name; the default stays with the first
    # A name is looked up again whenever one of its connections ends, but by default not within 30 s of the last time:
    # too late where all replicas of a headless service are replaced.
    ("grpc.dns_min_time_between_resolutions_ms", 1000),
    # A restarted Triton is back in seconds, but the default backoff grows to two minutes, and an attempt to connect
    # that nobody answers lasts 20 s.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A server answers pings more frequent than one in five minutes with GOAWAY "too_many_pings"; a dead peer is noticed
    # anyway, for keepalive also sets TCP_USER_TIMEOUT, here 3 s, and every call has a deadline.
    ("grpc.keepalive_time_ms", 330_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.enable_http_proxy", 0),  # a proxy for the web is none for Triton
    ("grpc.enable_retries", 0),  # ours know the deadline and the other replicas
)
# Messages are a few kilobytes (three rows of at most 512 int32), far below gRPC's own limit of 4 MiB.

_Reply = TypeVar("_Reply")

WatchCircuit = Callable[[str, str, str], Callable[[State], None]]
"""Takes address, model and version of a new circuit, and gives what is called with each of its states."""


class ModelError(Exception):
    """The engine gave no usable answer; the message is a plain sentence."""

    def __init__(self, message: str, *, told: str = "") -> None:
        """Say what went wrong, and besides what the engine told of it, which may be anything."""
        super().__init__(f"{message}: {told}" if told else message)
        self.plain = message
        """The message in our own words alone, for logs."""


class ModelUnavailable(ModelError):
    """No connection to Triton, or it is not asked because it failed a moment ago."""


class ModelNotLoaded(ModelUnavailable):
    """Triton answers, but does not serve this model now."""


class ModelTimeout(ModelError):
    """The deadline passed before the engine answered."""


class ModelOverloaded(ModelError):
    """More waits for the engine than may; worth another try a little later."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        """Say what is full, and in how many seconds it may be less so."""
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ModelBroken(ModelError):
    """The engine answered with an error, or with something that no window's logits can be."""


def tls_credentials(ca: str, cert: str = "", key: str = "") -> grpc.ChannelCredentials | None:
    """Read PEM files: the authority's certificates, and for mutual TLS our own with its key; None without the first.

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
    """Options of a channel whose server's certificate must have this name; without one, that of the address."""
    return (("grpc.ssl_target_name_override", name),) if name else ()


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model as the server has loaded it."""

    parameters: Mapping[str, str]
    """Those of its ``config.pbtxt``."""
    concurrency: int
    """Windows that it is to have at one time: twice those that its instances at all addresses compute at one time."""


class Engine(Protocol):
    """What the service needs of a model; `TritonModel` is the real one."""

    async def predict(self, windows: Sequence[Window], *, deadline: float) -> list[Logits]:
        """Run the engine on each window, all at once; all or nothing.

        Args:
            windows: no more than the engine is to have at one time.
            deadline: in `time.monotonic` seconds.

        Returns:
            For each window its start and end logits, each float32 of shape (1, length), perhaps read-only.

        Raises:
            ModelError: for one window at least there are no logits; work on the others has been cancelled.
        """
        ...

    async def check_ready(self, *, deadline: float) -> None:
        """Return if the model can be asked.

        Raises:
            ModelError: it cannot; the message says why.
        """
        ...

    async def loaded(self, *, deadline: float) -> "Loaded":
        """What the server has loaded.

        Raises:
            ModelError: the server did not tell.
        """
        ...

    async def server_version(self, *, deadline: float) -> str:
        """The version of the server.

        Raises:
            ModelError: the server did not tell.
        """
        ...

    def at(self, model: str, version: int) -> "Engine":
        """Another version or model of the same servers, over the same channels."""
        ...

    async def close(self) -> None:
        """End the connections; calls in flight fail."""
        ...


class TritonModel:
    """A version of a model in one Triton server, or in several that are replicas of each other.

    Holds one channel per address. Make one instance per process, inside its running event loop, and others by `at`.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        model: str = MODEL_NAME,
        version: int | None = None,
        watch_circuit: WatchCircuit | None = None,
        tls: grpc.ChannelCredentials | None = None,
        tls_name: str = "",
    ) -> None:
        """Open the channels; connections are made when first needed.

        Args:
            urls: gRPC addresses host:port; calls go round them, and all the addresses that a name resolves to. Replicas
                added under a name are found when a connection to an older one ends: have servers end them now and then
                (Triton's ``--grpc-max-connection-age``).
            model: name of the model.
            version: of the model; by default the highest that is loaded.
            tls: as `tls_credentials` gives it; without it, connections are in the clear.
            tls_name: that Triton's certificate must have; by default that of the address.
            watch_circuit: called with address, model and version when a circuit begins; gives what is told its states.

        Raises:
            ValueError: there is no address.
        """
        if not urls:
            raise ValueError("urls: at least one address host:port is needed")
        self._model = model
        self._version = str(version or "")
        self._replicas = [_Replica(url, tls, tls_name) for url in urls]
        self._watch_circuit = watch_circuit
        self._links: dict[tuple[str, str], list[_Link]] = {}  # of every model and version that `at` has made
        self._calls = count()
        self._heads: dict[int, bytes] = {}

    def at(self, model: str, version: int) -> "TritonModel":
        """As in `Engine`."""
        other = copy.copy(self)
        other._model, other._version, other._heads = model, str(version), {}
        return other

    async def predict(self, windows: Sequence[Window], *, deadline: float) -> list[Logits]:
        """As in `Engine`."""
        if len(windows) == 1:  # the common case needs no task
            return [await self._predict(windows[0], deadline)]
        calls = [asyncio.ensure_future(self._predict(window, deadline)) for window in windows]
        try:
            return await asyncio.gather(*calls)
        except BaseException:  # a failure of one, or the caller was cancelled: leave nothing running
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            raise

    async def check_ready(self, *, deadline: float) -> None:
        """As in `Engine`."""
        request = service_pb2.ModelReadyRequest(name=self._model, version=self._version)
        reply = await self._call("model_ready", request, deadline)
        if not reply.ready:
            raise ModelNotLoaded(f"Triton runs, but {self._name} is not ready.")

    async def loaded(self, *, deadline: float) -> Loaded:
        """As in `Engine`."""
        request = service_pb2.ModelConfigRequest(name=self._model, version=self._version)
        reply = await self._call("model_config", request, deadline)
        instances = sum(group.count * max(len(group.gpus), 1) for group in reply.config.instance_group)
        addresses = await asyncio.gather(*(replica.count_addresses() for replica in self._replicas))
        windows = max(instances, 1) * max(reply.config.max_batch_size, 1)
        parameters = {name: value.string_value for name, value in reply.config.parameters.items()}
        return Loaded(parameters, CALLS_PER_WINDOW * windows * sum(addresses))

    async def server_version(self, *, deadline: float) -> str:
        """As in `Engine`; of the replica whose turn it is."""
        reply = await self._call("server_metadata", service_pb2.ServerMetadataRequest(), deadline)
        return str(reply.version)

    @property
    def _name(self) -> str:
        return f"model {self._model!r}" + (self._version and f" version {self._version}")

    async def close(self) -> None:
        """As in `Engine`; ends those made by `at` too."""
        await asyncio.gather(*(replica.close() for replica in self._replicas))

    async def _predict(self, window: Window, deadline: float) -> Logits:
        message = self._request(window, deadline)
        logits: Logits = await self._call("model_infer", message, deadline, lambda reply: _logits(reply, window.length))
        return logits

    def _request(self, window: Window, deadline: float) -> bytes:
        # Messages of one type may be concatenated, so what is the same for all windows of a length is written once.
        length = window.length
        head = self._heads.get(length)
        if head is None:
            head = self._heads[length] = service_pb2.ModelInferRequest(
                model_name=self._model,
                model_version=self._version,
                inputs=[{"name": name, "datatype": "INT32", "shape": [1, length]} for name in INPUT_NAMES],
                outputs=[{"name": name} for name in OUTPUT_NAMES],
            ).SerializeToString()
        tail = service_pb2.ModelInferRequest(
            id=request_id.get(), raw_input_contents=[getattr(window, name).tobytes() for name in INPUT_NAMES]
        )
        # Triton drops what waited this long in its queue, where the queue policy has allow_timeout_override.
        tail.parameters["timeout"].int64_param = max(int((deadline - time.monotonic()) * 1e6), 1)
        return head + bytes(tail.SerializeToString())

    async def _call(
        self, method: str, request: object, deadline: float, read: Callable[[Any], _Reply] | None = None
    ) -> Any:
        """Ask the replica whose turn it is; if it fails, at once another one, and after a pause one again.

        Asking twice is harmless, for inference changes nothing. ``read`` makes of a reply what is wanted; only where it
        succeeds is the engine proved to work.
        """
        turn = next(self._calls)
        tried: list[_Link] = []
        failure: ModelError | None = None
        for attempt in range(_RETRIES + 1):
            link = await self._next_link(turn, tried, deadline)
            if link is None:
                raise failure or ModelUnavailable(
                    "Triton failed several times in a row and is left alone for a moment. "
                    + " ".join(link.circuit.reason for link in self._linked())
                )
            tried.append(link)
            if deadline <= time.monotonic():
                link.circuit.unknown()
                raise failure or ModelTimeout(_PASSED)
            try:
                return await self._ask(link, tried, method, request, deadline, read)
            except ModelError as error:
                failure = error
            elsewhere = len(tried) < len(self._replicas)
            pause = 0 if elsewhere else random.uniform(0.5, 1.5) * _RETRY_S * 2**attempt
            again = elsewhere or isinstance(failure, ModelUnavailable)
            if not again or isinstance(failure, ModelOverloaded) or time.monotonic() + pause >= deadline:
                break
            await asyncio.sleep(pause)
        assert failure
        raise failure

    async def _ask(
        self,
        link: "_Link",
        tried: "Sequence[_Link]",
        method: str,
        request: object,
        deadline: float,
        read: Callable[[Any], _Reply] | None,
    ) -> Any:
        """Ask one replica, once, and tell its circuit."""
        sent = time.monotonic()
        # A trial leaves time for a replica that is well.
        on_trial = len(tried) < len(self._replicas) and link.circuit.state is not State.CLOSED
        try:
            call = getattr(link.replica, method)(request, metadata=tracing.metadata())
            reply = await _within((deadline - sent) / (2 if on_trial else 1), call)
            if reply is None:
                raise ModelBroken("The engine's answer is no message of Triton's protocol.")
            result = read(reply) if read else reply
        except grpc.aio.AioRpcError as error:
            failure = _translate(error, link.replica.url, self._name)
            link.note(failure, sent)
            raise failure from error
        except (ModelBroken, ModelTimeout) as error:
            link.note(error, sent)
            raise
        except grpc.aio.UsageError as error:
            raise ModelUnavailable("The connection to Triton was closed.") from error
        except BaseException:
            link.circuit.unknown()
            raise
        if read:
            link.circuit.succeeded()
        else:
            link.circuit.unknown()
        return result

    def _linked(self) -> "list[_Link]":
        key = self._model, self._version
        if key not in self._links:
            watch = self._watch_circuit or (lambda *_: lambda state: None)
            self._links[key] = [_Link(replica, Circuit(watch(replica.url, *key))) for replica in self._replicas]
        return self._links[key]

    async def _next_link(self, turn: int, tried: "Sequence[_Link]", deadline: float) -> "_Link | None":
        """The first whose circuit allows a call: those not tried yet, from the one whose turn it is.

        Where there is none, but a trial is under way, its outcome is awaited: a request of several windows would else
        end its own trial by failing.
        """
        links = self._linked()
        begin = turn % len(links)
        order = sorted(links[begin:] + links[:begin], key=tried.count)
        until = min(deadline, time.monotonic() + TRIAL_S)
        while True:
            for link in order:
                if link.circuit.allows():
                    return link
            on_trial = [link.circuit for link in order if link.circuit.state is State.HALF_OPEN]
            if not on_trial or not await on_trial[0].trial_ends(until - time.monotonic()):
                return None


class _Replica:
    """One address and the three methods asked of it."""

    def __init__(self, url: str, tls: grpc.ChannelCredentials | None, tls_name: str) -> None:
        self.url = url
        self._addresses = 1
        self._lookup: asyncio.Task[int] | None = None
        target = url if "://" in url else f"dns:///{url}"
        self.channel = (
            grpc.aio.secure_channel(target, tls, options=_CHANNEL_OPTIONS + tls_options(tls_name))
            if tls
            else grpc.aio.insecure_channel(target, options=_CHANNEL_OPTIONS)
        )
        self.model_infer = self._method("ModelInfer", None, service_pb2.ModelInferResponse)
        self.model_ready = self._method("ModelReady", service_pb2.ModelReadyRequest, service_pb2.ModelReadyResponse)
        self.model_config = self._method("ModelConfig", service_pb2.ModelConfigRequest, service_pb2.ModelConfigResponse)
        self.server_metadata = self._method(
            "ServerMetadata", service_pb2.ServerMetadataRequest, service_pb2.ServerMetadataResponse
        )

    def _method(self, name: str, request: Any, reply: Any) -> Any:
        return self.channel.unary_unary(
            _SERVICE + name,
            request_serializer=request and request.SerializeToString,  # None: bytes already
            response_deserializer=partial(_parsed, reply),
        )

    async def count_addresses(self) -> int:
        """How many the URL stands for, or stood for when that was last known: a slow name server is not waited for."""
        lookup = self._lookup = self._lookup or asyncio.ensure_future(_addresses(self.url))
        await asyncio.wait([lookup], timeout=_LOOKUP_S)
        if lookup.done() and not lookup.cancelled():
            self._addresses = lookup.result()
            if self._lookup is lookup:
                self._lookup = None
        return self._addresses

    async def close(self) -> None:
        if self._lookup:
            self._lookup.cancel()
            await asyncio.wait([self._lookup])
        await self.channel.close()


class _Link:
    """A model's version at one address."""

    def __init__(self, replica: _Replica, circuit: Circuit) -> None:
        self.replica = replica
        self.circuit = circuit

    def note(self, failure: ModelError, sent: float) -> None:
        """Tell the circuit of a call that failed."""
        match failure:
            case ModelNotLoaded() | ModelOverloaded():
                self.circuit.unknown()  # the server is well
            case ModelTimeout():
                self.circuit.silent(sent, f"Triton at {self.replica.url} is silent.")
            case _:
                self.circuit.failed(sent, failure.plain)


async def _within(seconds: float, call: grpc.aio.UnaryUnaryCall[Any, Any]) -> Any:
    """The reply of a call, which is cancelled when its time is over.

    gRPC itself is told no timeout: it makes of it a moment of the wall clock, and of that one of the monotonic clock.
    Where the wall clock jumps in between, the call would end at once, or as much too late as the jump was wide.

    Raises:
        ModelTimeout: the time is over.
        grpc.aio.AioRpcError: the call failed.
    """
    is_late = False

    def end() -> None:
        nonlocal is_late
        is_late = call.cancel()

    timer = asyncio.get_running_loop().call_later(seconds, end)
    try:
        return await call
    except asyncio.CancelledError:
        if is_late:
            raise ModelTimeout(_PASSED) from None
        raise
    finally:
        timer.cancel()


def _parsed(message: Any, content: bytes) -> Any:
    try:
        return message.FromString(content)
    except DecodeError:
        return None  # as grpc.aio makes of it too, but with a traceback in the log


_PASSED = "The deadline passed before the engine answered."


async def _addresses(url: str) -> int:
    """How many addresses a URL stands for; 1 where that is not for the system's own resolver to say."""
    host, _, port = url.removeprefix("dns:///").rpartition(":")
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except OSError:
        return 1
    return max(Counter(family for family, *_ in found).values())  # a server may listen on IPv4 and on IPv6


def _logits(reply: Any, length: int) -> Logits:
    if len(reply.outputs) != len(reply.raw_output_contents):
        raise ModelBroken("The engine answered without raw tensors.")
    found = {output.name: (output, raw) for output, raw in zip(reply.outputs, reply.raw_output_contents, strict=True)}
    start, end = (_tensor(found, name, length) for name in OUTPUT_NAMES)
    return start, end


def _tensor(found: Mapping[str, tuple[Any, bytes]], name: str, length: int) -> FloatArray:
    if name not in found:
        raise ModelBroken(f"The engine's answer has no output {name!r} among its {len(found)}", told=str(sorted(found)))
    output, raw = found[name]
    shape = tuple(output.shape)
    if output.datatype != "FP32" or shape != (1, length) or len(raw) != 4 * length:
        raise ModelBroken(
            f"The engine's output {name!r} is not FP32 [1, {length}]",
            told=f"{output.datatype} {list(shape)} in {len(raw)} bytes",
        )
    values = np.frombuffer(raw, np.float32).reshape(1, length)
    if not are_real(values):
        raise ModelBroken(f"The engine's output {name!r} holds NaN, infinite or absurdly large numbers.")
    return values


def _translate(error: grpc.aio.AioRpcError, url: str, model: str) -> ModelError:
    code, details = error.code(), (error.details() or "").strip()
    match code:
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return ModelTimeout(_PASSED)
        case grpc.StatusCode.UNAVAILABLE if "maximum queue size" in details.lower():
            return ModelOverloaded(f"Triton's queue for {model} is full.")
        case grpc.StatusCode.UNAVAILABLE if "timeout expired" in details.lower():
            return ModelOverloaded(f"The request waited too long in Triton's queue for {model}.")
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.NOT_FOUND if "model" in details.lower():
            return ModelNotLoaded(f"Triton at {url} does not serve {model} now: {details}")
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.CANCELLED:
            return ModelUnavailable(f"No connection to Triton at {url}: {details}")
        case _:
            return ModelBroken(f"The engine failed with {code.name}", told=details)
