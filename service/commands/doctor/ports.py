"""Check that the ports are free, or used by our own service."""

import http.client
from collections.abc import Iterator

from service.commands.doctor.finding import Finding
from service.commands.doctor.running_triton import is_triton_at
from service.runtime.ports import LOOPBACK, PortError, TritonPorts, free_port


def check_ports(host: str, port: int, grpc_port: int | None) -> Iterator[Finding]:
    """Check every port that `bertqa serve` would use.

    Args:
        host: address that the service would listen on.
        port: port of the service.
        grpc_port: gRPC port of the embedded Triton; None if it would not be started.
    """
    wanted = [(host, port, "the service", "/health/live")]
    if grpc_port is not None:
        wanted += [
            (LOOPBACK, grpc_port, "Triton's gRPC", ""),
            (LOOPBACK, TritonPorts.metrics, "Triton's metrics", "/metrics"),
            (LOOPBACK, TritonPorts.http, "Triton's HTTP", "/v2/health/live"),
        ]
    for address, number, whose, path in wanted:
        yield _check_port(address, number, whose, path)


def _check_port(address: str, number: int, whose: str, path: str) -> Finding:
    subject = f"port {number}"
    try:
        found = free_port(address, number)
    except PortError as error:
        return Finding("FAIL", subject, str(error))
    if number in (0, found):  # 0 takes any
        return Finding("ok", subject, f"free for {whose}")
    if _answers(address, number, path) if path else is_triton_at(number):
        return Finding("ok", subject, f"{whose} is running")
    return Finding(
        "WARN",
        subject,
        "taken by another program",
        f"`bertqa serve` would use {found} for {whose}, but a container would not start",
    )


def _answers(host: str, port: int, path: str) -> bool:
    connection = http.client.HTTPConnection({"0.0.0.0": LOOPBACK, "::": "::1"}.get(host, host), port, timeout=2)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
        return response.status == 200 and (path != "/metrics" or b"nv_" in body)
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
