"""Triton with custom flags, and a gRPC server that speaks Triton's protocol."""

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from bertqa.windows import OUTPUT_NAMES
from service.runtime.processes import end_session
from service.runtime.triton_install import find_triton
from tests.support.ports import free_port
from tests.support.waiting import until


@contextlib.contextmanager
def triton_with(tmp_path: Path, repository: Path, *flags: str) -> Iterator[str]:
    """Run the real server with custom flags; yield its gRPC address."""
    cache = tmp_path / "cache"
    cache.mkdir()
    installation = find_triton(cache)
    port = free_port()
    command = [str(installation.binary), f"--model-repository={repository}", f"--grpc-port={port}"]
    command += ["--grpc-address=127.0.0.1", "--allow-http=false", "--allow-metrics=false", *flags]
    if installation.backends:
        command.append(f"--backend-directory={installation.backends}")
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(
            command, env={**os.environ, **installation.environment}, stdout=log, stderr=log, start_new_session=True
        )
    try:
        until(lambda: b"Started GRPCInferenceService" in (tmp_path / "log").read_bytes() or process.poll() is not None)
        yield f"localhost:{port}"
    finally:
        end_session(process, 10)


class Triton(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]  # it has no types
    def __init__(self, identity: str) -> None:
        self.identity = identity
        self.broken = False
        self.parents: list[str | None] = []

    def ModelConfig(self, request: Any, context: Any) -> Any:
        reply = service_pb2.ModelConfigResponse()
        reply.config.parameters["identity_7"].string_value = self.identity
        return reply

    def ServerMetadata(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerMetadataResponse(version="2.51.0")

    def ModelReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ModelReadyResponse(ready=True)

    def ModelInfer(self, request: Any, context: Any) -> Any:
        self.parents.append(dict(context.invocation_metadata()).get("traceparent"))
        if self.broken:
            context.abort(grpc.StatusCode.INTERNAL, "as asked")
        length = request.inputs[0].shape[1]
        outputs = [{"name": name, "datatype": "FP32", "shape": [1, length]} for name in OUTPUT_NAMES]
        return service_pb2.ModelInferResponse(
            outputs=outputs, raw_output_contents=[np.zeros(length, np.float32).tobytes()] * 2
        )


@contextlib.contextmanager
def listening(add: Callable[[Any, grpc.Server], None], servicer: object) -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(8))
    add(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()
