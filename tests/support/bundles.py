"""Small real bundles: published by the real builder, corrupted in various ways, or with faults on request."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from bertqa.manifest import MODEL_NAME, Manifest, sha256_of
from bertqa.repository import Repository
from bertqa.squad import Example, Reference, as_squad
from engine_builder.build import BuildOptions, build
from engine_builder.targets.openvino_model import engine_sha256
from tests.support.checkpoints import write_checkpoint

CONTEXT = "Ada Lovelace wrote the first program in London."
QUESTIONS = {"Who wrote it?": "Ada Lovelace", "Where was it written?": "London"}


def publish(repository: Repository, directory: Path, seed: int, model: str = MODEL_NAME, *, instances: int = 1) -> None:
    """Build a version from its own checkpoint with random weights."""
    checkpoint = write_checkpoint(directory / f"tiny{seed}")
    weights = load_file(checkpoint / "model.safetensors")
    random = np.random.default_rng(seed)
    noisy = {name: (value + random.normal(0, 0.3, value.shape)).astype(value.dtype) for name, value in weights.items()}
    save_file(noisy, checkpoint / "model.safetensors")
    examples = [
        Example(question, "t", question, CONTEXT, (Reference(text, CONTEXT.index(text)),))
        for question, text in QUESTIONS.items()
    ]
    (checkpoint / "gate.json").write_text(json.dumps(as_squad(examples)))
    build(
        BuildOptions(
            checkpoint=str(checkpoint),
            target="cpu",
            model=model,
            precision="fp32",
            repository=repository.root,
            threads=1,
            instances=instances,
        )
    )


def describe_anew(directory: Path, *names: str) -> None:
    """Update the manifest with the current hashes of these files."""
    manifest = Manifest.read(directory / "manifest.json")
    files = {**manifest.files, **{name: sha256_of(directory / name) for name in names}}
    hashed = engine_sha256(directory / "engine.xml")
    dataclasses.replace(manifest, files=files, engine_sha256=hashed).write(directory / "manifest.json")


def flip(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def break_engine(directory: Path) -> None:
    """Write an engine that matches the manifest but that no runtime can load."""
    (directory / "engine.bin").write_bytes(b"")
    describe_anew(directory, "engine.bin")


def expect_another_answer(directory: Path) -> None:
    """Add a question whose answer in the bundle is not the engine's."""
    questions = json.loads((directory / "questions.json").read_text())
    questions[0]["answer"] = "somebody else"
    (directory / "questions.json").write_text(json.dumps(questions))
    describe_anew(directory, "questions.json")


_FAULTY = '''

import random
import time


class TritonPythonModel(TritonPythonModel):
    """The engine above, with faults that a file switches on; each fault adds a byte to another file."""

    SWITCH, COUNT = Path({switch!r}), Path({count!r})

    def _respond(self, request):
        fault = json.loads(self.SWITCH.read_text()) if self.SWITCH.exists() else {{"kind": "none", "share": 0}}
        if random.random() >= fault["share"]:
            return super()._respond(request)
        with self.COUNT.open("ab") as count:
            count.write(b".")
        if fault["kind"] == "crash":
            os._exit(1)
        if fault["kind"] == "error":
            return self._triton.InferenceResponse(error=self._triton.TritonError("no memory"))
        if fault["kind"] == "slow":
            time.sleep(fault["seconds"])
        self._fault = fault["kind"]
        try:
            return super()._respond(request)
        finally:
            self._fault = "none"

    _fault = "none"

    def _tensor(self, name, array):
        if self._fault == "nan":
            array[0, 1] = np.nan
        elif self._fault == "infinite":
            array[0, 1] = np.inf
        elif self._fault == "shape":
            array = np.ascontiguousarray(array[:, 1:])
        return super()._tensor(name, array)
'''


class Faults:
    """The switch of a bundle's faults."""

    def __init__(self, directory: Path) -> None:
        self._switch = directory / "fault.json"
        self._count = directory / "faults"

    def install(self, bundle: Path) -> None:
        """Add the faults to a bundle's engine, before Triton loads it."""
        with (bundle / "model.py").open("a") as model:
            model.write(_FAULTY.format(switch=str(self._switch), count=str(self._count)))
        describe_anew(bundle, "model.py")

    @contextmanager
    def on(self, kind: str, *, share: float = 1.0, seconds: float = 0.0) -> Iterator[None]:
        """Make a share of the engine's calls fail during a block.

        Args:
            kind: "slow", "nan", "infinite", "shape", "error", or "crash" of the engine's process.
            share: share of the calls, from 0 to 1.
            seconds: delay of "slow".
        """
        partial = self._switch.with_suffix(".partial")
        partial.write_text(json.dumps({"kind": kind, "share": share, "seconds": seconds}))
        partial.replace(self._switch)
        try:
            yield
        finally:
            self._switch.unlink()

    @property
    def injected(self) -> int:
        """Return the number of faults so far."""
        return self._count.stat().st_size if self._count.exists() else 0
