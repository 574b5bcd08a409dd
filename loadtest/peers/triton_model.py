"""Tokenizer, ONNX Runtime and decoding inside one model of Triton's Python backend.

python -m loadtest.peers.triton_model REPOSITORY model.onnx     # writes the repository for tritonserver
"""

import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.peers.onnxruntime_reader import onnxruntime_reader

CONFIG = """\
name: "question_answering"
backend: "python"
max_batch_size: 1
input [
  { name: "question" data_type: TYPE_STRING dims: [ 1 ] },
  { name: "context" data_type: TYPE_STRING dims: [ 1 ] }
]
output [
  { name: "answer" data_type: TYPE_STRING dims: [ 1 ] },
  { name: "start" data_type: TYPE_INT32 dims: [ 1 ] },
  { name: "end" data_type: TYPE_INT32 dims: [ 1 ] }
]
instance_group [ { count: 1 kind: KIND_CPU } ]
"""


class TritonPythonModel:
    """What Triton calls; one instance is one process."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the model beside this file."""
        import triton_python_backend_utils  # noqa: PLC0415  exists inside Triton only

        self._triton: Any = triton_python_backend_utils
        directory = Path(args["model_repository"]) / args["model_version"]
        self._reader = onnxruntime_reader(str(directory / "model.onnx"))

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer the requests that Triton has batched, of one question each."""
        pairs = [(self._text(request, "question"), self._text(request, "context")) for request in requests]
        return [self._response(answer) for answer in self._reader.read(pairs)]

    def _text(self, request: Any, name: str) -> str:
        text: bytes = self._triton.get_input_tensor_by_name(request, name).as_numpy()[0, 0]
        return text.decode()

    def _response(self, answer: Mapping[str, Any]) -> Any:
        arrays = {
            "answer": np.array([[answer["answer"].encode()]], np.object_),
            "start": np.array([[answer["start"]]], np.int32),
            "end": np.array([[answer["end"]]], np.int32),
        }
        return self._triton.InferenceResponse([self._triton.Tensor(*named) for named in arrays.items()])


def write_repository(repository: Path, model: Path) -> None:
    """Lay the model out as Triton wants it."""
    version = repository / "question_answering" / "1"
    version.mkdir(parents=True)
    (version.parent / "config.pbtxt").write_text(CONFIG)
    shutil.copy(__file__, version / "model.py")
    (version / "model.onnx").symlink_to(model.resolve())


if __name__ == "__main__":
    write_repository(*map(Path, sys.argv[1:]))
