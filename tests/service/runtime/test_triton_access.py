"""Who may call an embedded Triton, and which of its APIs."""

import asyncio
import contextlib
import http.client
import socket
import stat
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from service.runtime.triton_process import EmbeddedTriton
from tests.support.processes import shared_memory
from tests.support.toy_triton import assert_right, run, soon, window


@pytest.mark.triton
def test_apis_that_nobody_needs_are_closed(server: EmbeddedTriton) -> None:
    async def refused(method: str, request: Any) -> None:
        async with grpc.aio.insecure_channel(server.url) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await getattr(service_pb2_grpc.GRPCInferenceServiceStub(channel), method)(request)
            assert "restricted" in str(error.value.details()) or "polling is enabled" in str(error.value.details())

    requests = {
        "SystemSharedMemoryRegister": service_pb2.SystemSharedMemoryRegisterRequest(name="a", key="/a", byte_size=4),
        "SystemSharedMemoryStatus": service_pb2.SystemSharedMemoryStatusRequest(),
        "CudaSharedMemoryStatus": service_pb2.CudaSharedMemoryStatusRequest(),
        "TraceSetting": service_pb2.TraceSettingRequest(),
        "LogSettings": service_pb2.LogSettingsRequest(),
        "RepositoryModelLoad": service_pb2.RepositoryModelLoadRequest(model_name="bert_qa"),
        "RepositoryModelUnload": service_pb2.RepositoryModelUnloadRequest(model_name="bert_qa"),
    }
    for method, request in requests.items():
        asyncio.run(refused(method, request))
    for path, method in {
        "systemsharedmemory/status": "GET",
        "systemsharedmemory/region/a/register": "POST",
        "cudasharedmemory/status": "GET",
        "trace/setting": "GET",
        "logging": "POST",
        "repository/models/bert_qa/load": "POST",
        "repository/models/bert_qa/unload": "POST",
    }.items():
        connection = http.client.HTTPConnection("127.0.0.1", server.ports.http, timeout=30)
        with closing(connection):
            connection.request(method, f"/v2/{path}", body=b"{}" if method == "POST" else None)
            response = connection.getresponse()
            said = response.read().decode()
            assert response.status >= 400, path
            assert "restricted" in said or "polling is enabled" in said, (path, said)
    assert_right([window()], run(server.url, lambda model: model.predict([window()], deadline=soon())))


def raw_http(port: int, header: bytes) -> bytes:
    """The reply to a request over HTTP/1.1 with a header that no library would send."""
    request = b"GET /v2/systemsharedmemory/status HTTP/1.1\r\nhost: x\r\n%b\r\nconnection: close\r\n\r\n" % header
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(request)
        return b"".join(iter(partial(connection.recv, 65536), b""))


def raw_grpc(port: int, name: bytes, value: bytes) -> bytes:
    """The same over HTTP/2, frame by frame; returns what came within a second."""

    def frame(kind: int, flags: int, stream: int, content: bytes) -> bytes:
        return len(content).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + content

    headers = {
        b":method": b"POST",
        b":scheme": b"http",
        b":path": b"/inference.GRPCInferenceService/SystemSharedMemoryStatus",
        b":authority": b"x",
        b"content-type": b"application/grpc",
        b"te": b"trailers",
        name: value,
    }
    block = b"".join(b"\0%c%b%c%b" % (len(key), key, len(text), text) for key, text in headers.items())
    with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b""))
        connection.sendall(frame(1, 4, 1, block) + frame(0, 1, 1, bytes(5)))
        received = bytearray()
        with contextlib.suppress(TimeoutError):
            while chunk := connection.recv(65536):
                received += chunk
                if len(received) > 1_000_000:
                    break
        return bytes(received)


@pytest.mark.triton
def test_what_other_users_can_read_about_an_embedded_triton_opens_nothing(server: EmbeddedTriton) -> None:
    regions = [path for path in shared_memory() if path.stat().st_size]
    assert regions, "the Python backend's"
    assert {stat.S_IMODE(path.stat().st_mode) for path in shared_memory()} == {0o600}
    arguments = Path(f"/proc/{server.pid}/cmdline").read_text().split("\0")
    keys = {argument.split(":", 1)[1] for argument in arguments if "restricted" in argument}
    assert keys
    for key in keys:
        name, value = key.encode().split(b"=")
        for header in (b"%b: %b", b"%b:%b", b"%b : %b", b'"%b": %b'):
            assert raw_http(server.ports.http, header % (name, value)).startswith(b"HTTP/1.1 403"), header
        for prefix in (b"", b"triton-grpc-protocol-"):
            reply = raw_grpc(server.ports.grpc, prefix + name, value)
            assert reply
            assert b"grpc-status\x010" not in reply, "not a success"
    assert b"restricted" in raw_grpc(server.ports.grpc, b"x-other", b"none"), "so a request as such is understood"


@pytest.mark.triton
def test_an_embedded_triton_listens_on_the_loopback_interface_alone(server: EmbeddedTriton) -> None:
    ports, listening = {server.ports.grpc, server.ports.http, server.ports.metrics}, set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{server.pid}/net/{table}").read_text().splitlines()[1:]:
            address, port = line.split()[1].split(":")
            if line.split()[3] == "0A" and int(port, 16) in (
                server.ports.grpc,
                server.ports.http,
                server.ports.metrics,
            ):
                listening.add((address, int(port, 16)))
    mapped = "0000000000000000FFFF00000100007F"  # ::ffff:127.0.0.1, as gRPC writes it
    assert {(address.replace(mapped, "0100007F"), port) for address, port in listening} == {
        ("0100007F", port) for port in ports
    }
