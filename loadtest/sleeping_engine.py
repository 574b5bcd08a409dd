"""A model repository with an engine that sleeps a fixed time instead of computing, so that cores do not limit.

python -m loadtest.sleeping_engine --milliseconds 20 --instances 4 DIRECTORY
bertqa serve --repository DIRECTORY

Tensors, tokenizer, limits and the check of its identity are those of the engine that it stands in for; what it measures
is everything around one. Its answer to every question is the first token of the context (of the first one, where there
are several), widened to a word.
"""

import ctypes
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

LOGIT = 8.0
"""Start and end logit of the answer; those of all other tokens are 0."""
_VERSION = 1


class TritonPythonModel:
    """What Triton's Python backend calls; one instance is one process, and sleeps by itself."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Read how long to sleep."""
        import triton_python_backend_utils  # noqa: PLC0415  exists inside Triton only

        self._triton: Any = triton_python_backend_utils
        directory = Path(args["model_repository"]) / args["model_version"]
        self._seconds = float(json.loads((directory / "sleep.json").read_text())["seconds"])

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer each request, one after the other."""
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        time.sleep(self._seconds)
        types = np.from_dlpack(self._triton.get_input_tensor_by_name(request, "token_type_ids"))
        logits = np.zeros(types.shape, np.float32)
        logits[np.arange(len(types)), types.argmax(axis=1)] = LOGIT
        outputs = [self._tensor(name, logits.copy()) for name in ("start_logits", "end_logits")]
        return self._triton.InferenceResponse(outputs)

    def _tensor(self, name: str, array: NDArray[np.float32]) -> Any:
        capsule = array.__dlpack__()  # this and the name of the capsule: see engine_builder/targets/openvino_model.py
        tensor = self._triton.Tensor.from_dlpack(name, capsule)
        ctypes.pythonapi.PyCapsule_SetName(ctypes.py_object(capsule), ctypes.c_char_p(b"used_dltensor"))
        return tensor


def write_repository(directory: Path, *, source: Path, seconds: float, instances: int) -> None:
    """Write the repository, with one model of one version, its active one.

    Args:
        directory: new, or one of these that is to be replaced while no Triton reads it.
        source: repository with the bundle whose tokenizer and limits it takes.
        seconds: to sleep for each window.
        instances: how many windows sleep at one time.

    Raises:
        BundleMismatch: the source holds no whole bundle.
    """
    # Triton runs this very file where the package is not installed.
    from bertqa.manifest import MANIFEST_FILE, MODEL_NAME, TOKENIZER_FILE, sha256_of  # noqa: PLC0415
    from bertqa.repository import Repository  # noqa: PLC0415

    bundle = Repository(source).open()
    repository = Repository(directory)
    target = repository.directory(MODEL_NAME, _VERSION)
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(Repository(source).directory(bundle.model, bundle.version) / TOKENIZER_FILE, target)
    shutil.copy(__file__, target / "model.py")
    (target / "sleep.json").write_text(json.dumps({"seconds": seconds}) + "\n")
    (target / "__pycache__").write_text("A file, so that Python's cache is no change that Triton would load again.\n")
    manifest = replace(
        bundle.manifest,
        name=f"sleeping-{seconds * 1000:g}ms",
        target="cpu",
        precision="none",
        engine_file="sleep.json",
        engine_sha256=sha256_of(target / "sleep.json"),
        exact_match=0.0,
        f1=0.0,
        latency_ms={},
        cpu_features=(),
        max_batch_size=1,
        built=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        files={path.name: sha256_of(path) for path in sorted(target.iterdir()) if path.name != MANIFEST_FILE},
    )
    manifest.write(target / MANIFEST_FILE)
    repository.activate(MODEL_NAME, _VERSION, alone=True, instances=instances)


if __name__ == "__main__":
    from bertqa.cli.command import run
    from loadtest.commands import sleeping_app

    run(sleeping_app, "python -m loadtest.sleeping_engine")
