"""A small model in a real Triton that misbehaves on request, and clients for it."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from bertqa.spans import Logits
from bertqa.windows import INPUT_NAMES, OUTPUT_NAMES, Window
from engine_builder.publish import NO_CACHE
from service.triton.channels import Channels
from service.triton.client import TritonEngine
from service.triton.errors import EngineOverloaded, EngineTimeout, EngineUnavailable

T = TypeVar("T")


SLEEP, NAN, SHAPE, RAISE, CRASH = range(60_001, 60_006)
"""First token of a window that makes the model do so; the second is its argument."""

MODEL = f"""
import ctypes
import os
import time
import numpy as np
import triton_python_backend_utils as triton

class TritonPythonModel:
    def initialize(self, args):
        if os.environ.get("TOY_MODEL_FAILS"):
            raise FileNotFoundError("engine.bin is not there")

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        ids, mask, types = (
            np.from_dlpack(triton.get_input_tensor_by_name(request, name)) for name in {INPUT_NAMES}
        )
        start = (ids + mask).astype(np.float32)
        end = (types - ids).astype(np.float32)
        match ids[0, 0]:
            case {SLEEP}:
                time.sleep(ids[0, 1] / 1000)
            case {NAN}:
                start[0, 5] = np.nan
            case {SHAPE}:
                end = np.ascontiguousarray(end[:, 1:])
            case {RAISE}:
                raise ValueError("no such bucket")
            case {CRASH}:
                os._exit(1)
        pairs = zip({OUTPUT_NAMES}, (start, end))
        return triton.InferenceResponse([self.tensor(name, value) for name, value in pairs])

    def tensor(self, name, value):  # as in the engine's own model.py, which says why
        capsule = value.__dlpack__()
        tensor = triton.Tensor.from_dlpack(name, capsule)
        ctypes.pythonapi.PyCapsule_SetName(ctypes.py_object(capsule), USED)
        return tensor

USED = b"used_dltensor"
"""


def config(identity: str) -> str:
    inputs = ", ".join(f'{{ name: "{name}" data_type: TYPE_INT32 dims: [ -1 ] }}' for name in INPUT_NAMES)
    outputs = ", ".join(f'{{ name: "{name}" data_type: TYPE_FP32 dims: [ -1 ] }}' for name in OUTPUT_NAMES)
    return f"""
        name: "bert_qa" backend: "python" max_batch_size: 1
        input [ {inputs} ] output [ {outputs} ]
        instance_group [ {{ count: 1 kind: KIND_CPU }} ]
        dynamic_batching {{ default_queue_policy {{
            timeout_action: REJECT default_timeout_microseconds: 20000000
            allow_timeout_override: true max_queue_size: 16
        }} }}
        parameters {{ key: "identity_1" value {{ string_value: "{identity}" }} }}
    """


def write_repository(directory: Path, identity: str = "toy") -> Path:
    version = directory / "bert_qa" / "1"
    version.mkdir(parents=True, exist_ok=True)
    (version / "model.py").write_text(MODEL)
    (version / NO_CACHE).write_text("so that Triton loads it once")
    (version.parent / "config.pbtxt").write_text(config(identity))
    return directory


def window(*first: int, length: int = 64, seed: int = 0) -> Window:
    rows = np.random.default_rng(seed).integers(0, 30_000, (3, 1, length), dtype=np.int32)
    rows[0, 0, : len(first)] = first
    ids, mask, types = rows
    return Window(ids, mask, types, 3, 0, length - 4)


def assert_right(windows: list[Window], logits: list[Logits]) -> None:
    assert len(windows) == len(logits)
    for sent, (start, end) in zip(windows, logits, strict=True):
        assert start.dtype == end.dtype == np.float32
        np.testing.assert_array_equal(start, sent.input_ids + sent.attention_mask)
        np.testing.assert_array_equal(end, sent.token_type_ids - sent.input_ids)


def soon(seconds: float = 30.0) -> float:
    return time.monotonic() + seconds


def with_channels(url: str, scenario: Callable[[Channels], Awaitable[T]], **settings: Any) -> T:
    """Run a scenario with connections of its own, and see that it leaves no task behind."""

    async def with_own() -> T:
        channels = Channels(url.split(","), **settings)
        try:
            result = await asyncio.wait_for(scenario(channels), 90)
            assert asyncio.all_tasks() == {asyncio.current_task()}
            return result
        finally:
            await channels.close()

    return asyncio.run(with_own())


def run(url: str, scenario: Callable[[TritonEngine], Awaitable[T]], **settings: Any) -> T:
    """Run a scenario with an engine client for the toy model."""
    return with_channels(url, lambda channels: scenario(channels.engine()), **settings)


async def until_answered(model: TritonEngine) -> None:
    while True:
        try:
            return assert_right([window()], await model.predict([window()], deadline=soon(2)))
        except (EngineUnavailable, EngineTimeout, EngineOverloaded):
            await asyncio.sleep(0.1)
