"""How each server is started and asked; all serve the same checkpoint, over HTTP and JSON."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent.parent
HOST = "127.0.0.1"
BASELINE = "pipeline"
OURS = "ours"


@dataclass(frozen=True, slots=True)
class Server:
    """A server to measure."""

    title: str
    command: Sequence[str]  # with {port} where its port goes
    path: str
    span: Callable[[Any], Any] = lambda reply: reply  # the part of a reply with "start", "end" and the text
    text: str = "answer"  # the field with the text
    environment: Mapping[str, str] = field(default_factory=dict)


def servers(python: Path, checkpoint: Path, directory: Path) -> dict[str, Server]:
    """All servers by their short names.

    Args:
        python: of the environment that holds the others.
        checkpoint: what all of them serve.
        directory: where `prepare` has put the exports.
    """
    uvicorn = [str(python), "-m", "uvicorn", "--host", HOST, "--port", "{port}", "--no-access-log"]
    onnx = [*uvicorn, "loadtest.peers.onnxruntime_server:app"]
    bentoml = [str(python.parent / "bentoml"), "serve", "--host", HOST, "--port", "{port}"]
    triton = [str(python), "-m", "service.runtime.triton", "--repository", str(directory / "repository")]
    bertqa = [str(Path(sys.executable).parent / "bertqa"), "serve", "--repository", str(directory / "bertqa")]
    shared = {"CHECKPOINT": str(checkpoint), "PYTHONPATH": str(PROJECT), "HF_HUB_OFFLINE": "1"}
    return {
        BASELINE: Server(
            "FastAPI, Hugging Face pipeline",
            [*uvicorn, "loadtest.peers.pipeline_server:app"],
            "/answer",
            environment=shared,
        ),
        "litserve": Server(
            "LitServe, torch",
            [str(python), "-m", "loadtest.peers.litserve_server", "--port", "{port}"],
            "/predict",
            environment=shared,
        ),
        "bentoml": Server(
            "BentoML, torch",
            [*bentoml, "loadtest.peers.bentoml_server:QuestionAnswering"],
            "/answer",
            environment=shared | {"BENTOML_DO_NOT_TRACK": "True", "BENTOML_HOME": str(directory / "bentoml")},
        ),
        "onnxruntime": Server(
            "FastAPI, ONNX Runtime", onnx, "/answer", environment=shared | {"MODEL": str(directory / "model.onnx")}
        ),
        "onnxruntime-int8": Server(
            "FastAPI, ONNX Runtime int8",
            onnx,
            "/answer",
            environment=shared | {"MODEL": str(directory / "model.int8.onnx")},
        ),
        "triton": Server(
            "Triton, all in a Python model",
            [*triton, "--http-port", "{port}", "--grpc-port", "0", "--metrics-port", "0"],
            "/v2/models/question_answering/generate",
            environment=shared,
        ),
        OURS: Server(
            "bertqa",
            [*bertqa, "--port", "{port}", "--triton-grpc-port", "0"],
            "/v1/answer",
            span=lambda reply: reply["answers"][0],
            text="text",
            # The others queue without a limit, so ours does too: by default it would turn some of 64 clients away.
            environment={"BERTQA_MAX_WAIT_S": "10"},
        ),
    }


def prepare(python: Path, checkpoint: Path, directory: Path) -> None:
    """Build our engine, and export the checkpoint for the servers that do not read it; arguments as for `servers`.

    Raises:
        subprocess.CalledProcessError: an export failed; its own message is on standard error.
    """
    graph = str(directory / "model.onnx")
    for command in (
        [
            sys.executable,
            "-m",
            "engine_builder",
            "--checkpoint",
            str(checkpoint),
            "--target",
            "cpu",
            "--repository",
            str(directory / "bertqa"),
        ],
        [sys.executable, "-m", "engine_builder.architectures", str(checkpoint), graph],
        [str(python), "-m", "loadtest.peers.quantize", str(checkpoint), graph, str(directory / "model.int8.onnx")],
        [str(python), "-m", "loadtest.peers.triton_model", str(directory / "repository"), graph],
    ):
        subprocess.run(command, cwd=PROJECT, env=os.environ | {"CHECKPOINT": str(checkpoint)}, check=True)
