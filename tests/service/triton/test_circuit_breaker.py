"""The circuit breaker by itself."""

import time

from service.triton.circuit_breaker import FAILURES, CircuitBreaker


def test_calls_that_fail_together_are_one_failure() -> None:
    circuit = CircuitBreaker()
    sent = time.monotonic()
    for _ in range(100):
        circuit.failed(sent, "the connection broke")
    assert circuit.allows()
    for _ in range(FAILURES - 1):
        circuit.failed(time.monotonic(), "and again")
    assert not circuit.allows()
    circuit.succeeded()  # one that was on its way
    assert circuit.allows()
