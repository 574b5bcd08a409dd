"""Choose the replica for each call, and retry failed calls.

Calls alternate between the replicas. A failed call is retried at once on a replica that has not been tried, or after a
pause on one that has. Each version of a model has a circuit breaker at each replica. Retries are safe, because
inference has no side effects.
"""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from itertools import count
from typing import TypeVar

from service.triton.circuit_breaker import TRIAL_S, CircuitBreaker, State
from service.triton.errors import (
    EngineError,
    EngineNotLoaded,
    EngineOverloaded,
    EngineTimeout,
    EngineUnavailable,
)
from service.triton.replica import PASSED, Replica

RETRIES = 2
"""Limit on retries of a call."""
_RETRY_S = 0.1  # mean pause before the first retry; doubled for the next

WatchCircuit = Callable[[str, str, str], Callable[[State], None]]
"""Takes address, model and version of a new circuit breaker; returns a function to call with its later states."""

T = TypeVar("T")


class Link:
    """A version of a model at one replica, with its circuit breaker."""

    def __init__(self, replica: Replica, circuit: CircuitBreaker) -> None:
        self.replica = replica
        self.circuit = circuit

    def note(self, failure: EngineError, sent: float) -> None:
        """Report a failed call to the circuit breaker; ``sent`` is its start in `time.monotonic` seconds."""
        match failure:
            case EngineNotLoaded() | EngineOverloaded():
                self.circuit.unknown()  # the server works
            case EngineTimeout():
                self.circuit.silent(sent, f"Triton at {self.replica.url} is silent.")
            case _:
                self.circuit.failed(sent, failure.plain)


class Failover:
    """Calls one version of a model at a replica that works; for one event loop, without locks."""

    def __init__(
        self, replicas: Sequence[Replica], model: str, version: str, watch_circuit: WatchCircuit | None = None
    ) -> None:
        """Start with all circuits closed.

        Args:
            replicas: at least one.
            model: name of the model.
            version: empty for the highest version that a server has loaded.
            watch_circuit: observes the states of the circuit breakers.
        """
        self.model = model
        self.version = version
        self.description = f"model {model!r}" + (version and f" version {version}")
        """Model and version, for messages."""
        watch = watch_circuit or (lambda *_: lambda state: None)
        self._links = [Link(replica, CircuitBreaker(watch(replica.url, model, version))) for replica in replicas]
        self._turns = count()

    async def call(
        self, method: str, request: bytes, deadline: float, read: Callable[[bytes], T], *, proves_engine: bool = False
    ) -> T:
        """Call a method of Triton's gRPC service, with at most `RETRIES` retries.

        Args:
            method: name of the method.
            request: serialized message.
            deadline: in `time.monotonic` seconds.
            read: parses the serialized reply; raises `EngineBroken` if it is unusable.
            proves_engine: whether a result proves that the engine works, and so closes its circuit.

        Raises:
            EngineError: the last failure, when no replica or no time is left.
        """
        turn = next(self._turns)
        tried: list[Link] = []
        failure: EngineError | None = None
        for attempt in range(RETRIES + 1):
            link = await self._next_link(turn, tried, deadline)
            if link is None:
                raise failure or self._all_open()
            tried.append(link)
            if deadline <= time.monotonic():
                link.circuit.unknown()
                raise failure or EngineTimeout(PASSED)
            try:
                return await self._try(link, len(tried), method, request, deadline, read, proves_engine)
            except EngineError as error:
                failure = error
            is_untried = len(tried) < len(self._links)
            pause = 0 if is_untried else random.uniform(0.5, 1.5) * _RETRY_S * 2**attempt
            is_worth_it = is_untried or isinstance(failure, EngineUnavailable)
            if not is_worth_it or isinstance(failure, EngineOverloaded) or time.monotonic() + pause >= deadline:
                break
            await asyncio.sleep(pause)
        assert failure
        raise failure

    async def _try(
        self,
        link: Link,
        attempt: int,
        method: str,
        request: bytes,
        deadline: float,
        read: Callable[[bytes], T],
        proves_engine: bool,
    ) -> T:
        """Call one replica once and report to its circuit breaker; ``attempt`` counts from 1."""
        sent = time.monotonic()
        timeout_s = deadline - sent
        if link.circuit.state is not State.CLOSED and attempt < len(self._links):
            timeout_s /= 2  # leaves time for another replica if the trial fails
        try:
            result = read(await link.replica.call(method, request, timeout_s, self.description))
        except EngineError as error:
            link.note(error, sent)
            raise
        except BaseException:
            link.circuit.unknown()
            raise
        if proves_engine:
            link.circuit.succeeded()
        else:
            link.circuit.unknown()
        return result

    async def _next_link(self, turn: int, tried: Sequence[Link], deadline: float) -> Link | None:
        """Find the next replica whose circuit breaker allows a call; untried ones come first, from index ``turn``.

        If none allows it but a trial is in progress, wait for its outcome. Otherwise a request with several windows
        would fail because of its own trial.
        """
        begin = turn % len(self._links)
        if not tried and self._links[begin].circuit.allows():
            return self._links[begin]
        order = sorted(self._links[begin:] + self._links[:begin], key=tried.count)
        until = min(deadline, time.monotonic() + TRIAL_S)
        while True:
            for link in order:
                if link.circuit.allows():
                    return link
            on_trial = [link.circuit for link in order if link.circuit.state is State.HALF_OPEN]
            if not on_trial or not await on_trial[0].trial_ends(until - time.monotonic()):
                return None

    def _all_open(self) -> EngineUnavailable:
        reasons = " ".join(link.circuit.reason for link in self._links)
        return EngineUnavailable(f"Triton failed several times in a row; calls pause for a moment. {reasons}")
