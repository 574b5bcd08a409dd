"""Run the CPU engine in Triton's Python backend; the builder copies this file into each version as ``model.py``.

It imports nothing from this project, because Triton runs it alone: only numpy, OpenVINO and, inside Triton,
``triton_python_backend_utils``. The builder measures the engine through the same `Engine`.
"""

import ctypes
import hashlib
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# If openvino_telemetry is installed, OpenVINO reports every import to Google Analytics from a forked process. Without
# a network that process stays alive, and stopping the engine waits for it.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

import openvino as ov  # noqa: E402

_TAKEN_OVER = ctypes.c_char_p(b"used_dltensor")
_log = logging.getLogger("bert_qa")


class Engine:
    """An OpenVINO engine with one graph per bucket, compiled for latency; not thread-safe.

    A graph of fixed length avoids shape inference per call, which takes up to a third of the time of a short window.
    """

    def __init__(
        self, path: Path, *, precision: str, buckets: Sequence[int], threads: int, max_batch_size: int = 1
    ) -> None:
        """Compile the engine.

        Args:
            path: the OpenVINO ``.xml`` file, with its ``.bin`` in the same directory.
            precision: "fp32", "bf16" or "int8". The floating-point parts of int8 compute in bf16 if the CPU has AMX
                for it, otherwise in float32, which is then faster.
            buckets: lengths to compile for, in tokens.
            threads: CPU cores that one call may use.
            max_batch_size: most windows of one length in a call.
        """
        core = ov.Core()
        self.float_type = "bf16" if precision == "bf16" or (precision == "int8" and _has_amx()) else "f32"
        if self.float_type == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            _log.warning("this CPU has no bf16: %s computes in float32, which is slower but as exact", path.name)
            self.float_type = "f32"
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": self.float_type,
            "INFERENCE_NUM_THREADS": threads,
            "ENABLE_CPU_PINNING": False,  # pinning would put several instances on the same cores
        }
        model = core.read_model(path)
        self.output_names = [output.any_name for output in model.outputs]
        self._requests: dict[tuple[int, bool], ov.InferRequest] = {}  # keyed by length and "several windows"
        for length in buckets:
            for several in (False, True)[: 1 + (max_batch_size > 1)]:
                windows = ov.Dimension(2, max_batch_size) if several else 1
                model.reshape({tensor.any_name: [windows, length] for tensor in model.inputs})
                request = core.compile_model(model, "CPU", options).create_infer_request()
                self._requests[length, several] = request

    def infer(self, tensors: Mapping[str, NDArray[Any]]) -> list[NDArray[np.float32]]:
        """Run one window, or several of one length.

        Args:
            tensors: the inputs by name, each int32 of shape (windows, length); length is one of the buckets.

        Returns:
            The outputs in the order of ``output_names``, each float32 of shape (windows, length).

        Raises:
            ValueError: the length is not one of the buckets.
        """
        windows, length = next(iter(tensors.values())).shape
        request = self._requests.get((length, windows > 1))
        if request is None:
            raise ValueError(
                f"length {length} is not one of the engine's buckets {sorted({n for n, _ in self._requests})}"
            )
        request.infer(tensors, share_inputs=True, share_outputs=True)
        # copied, because the next call of this length overwrites the memory
        return [np.array(request.get_output_tensor(n).data) for n in range(len(self.output_names))]


def _has_amx() -> bool:
    # A copy of the check in `bertqa.hardware.cpu_features`: a Triton with only numpy and OpenVINO cannot import bertqa,
    # and a bundle must not change with the installed release.
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def engine_sha256(path: Path) -> str:
    """Return the SHA-256 over both files of an OpenVINO model, the ``.xml`` and then its ``.bin``, in hexadecimal."""
    digest = hashlib.sha256()
    for part in (path, path.with_suffix(".bin")):
        with part.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


class TritonPythonModel:
    """The interface of Triton's Python backend; each instance is a process with one engine."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the engine described by the manifest in this file's directory.

        Raises:
            RuntimeError: the engine's files do not match the manifest.
        """
        import triton_python_backend_utils  # noqa: PLC0415  exists inside Triton only

        self._triton: Any = triton_python_backend_utils
        directory = Path(args["model_repository"]) / args["model_version"]
        manifest = json.loads((directory / "manifest.json").read_text())
        path = directory / manifest["engine_file"]
        if engine_sha256(path) != manifest["engine_sha256"]:
            raise RuntimeError(f"{path}: does not match manifest.json; build the engine again")
        config = json.loads(args["model_config"])
        self._inputs = [tensor["name"] for tensor in config["input"]]
        threads = int(config["parameters"]["threads"]["string_value"]) or len(os.sched_getaffinity(0))
        self._engine = Engine(
            path,
            precision=manifest["precision"],
            buckets=manifest["buckets"],
            threads=threads,
            max_batch_size=manifest["max_batch_size"],
        )

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer requests of one length, grouped by Triton's batcher; if the batch fails, answer each one alone."""
        if len(requests) > 1:
            try:
                inputs = [self._read(request) for request in requests]
                joined = {name: np.concatenate([each[name] for each in inputs]) for name in self._inputs}
                return [self._write(rows) for rows in zip(*self._infer_rows(joined), strict=True)]
            except Exception as error:  # only the bad request must fail
                _log.warning("a batch of %d requests failed: %s", len(requests), error)
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        try:
            return self._write(self._engine.infer(self._read(request)))
        except Exception as error:  # whatever the error is, the instance must survive it
            return self._triton.InferenceResponse(error=self._triton.TritonError(f"{type(error).__name__}: {error}"))

    def _infer_rows(self, tensors: Mapping[str, NDArray[Any]]) -> list[list[NDArray[np.float32]]]:
        """Split each output into rows with memory of their own, because Triton takes ownership of it."""
        return [[row.copy() for row in np.split(array, len(array))] for array in self._engine.infer(tensors)]

    def _read(self, request: Any) -> dict[str, NDArray[Any]]:
        # Tensors pass through DLPack: Triton's own conversions were compiled for NumPy 1, and with NumPy 2 they
        # read zeros and send empty tensors.
        return {name: np.from_dlpack(self._triton.get_input_tensor_by_name(request, name)) for name in self._inputs}

    def _write(self, outputs: Sequence[NDArray[np.float32]]) -> Any:
        return self._triton.InferenceResponse(
            [self._tensor(name, array) for name, array in zip(self._engine.output_names, outputs, strict=True)]
        )

    def _tensor(self, name: str, array: NDArray[np.float32]) -> Any:
        capsule = array.__dlpack__()
        tensor = self._triton.Tensor.from_dlpack(name, capsule)
        # Triton renames a capsule that it takes over. NumPy knows only the name in the DLPack standard, and would
        # log an error for every tensor.
        ctypes.pythonapi.PyCapsule_SetName(ctypes.py_object(capsule), _TAKEN_OVER)
        return tensor
