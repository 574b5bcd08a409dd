"""Check the shared memory for windows and logits between Triton and the engines of its Python backend."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from bertqa.manifest import Bundle
from bertqa.triton_config import Serving
from service.commands.doctor.finding import Finding

SHARED_MEMORY = Path("/dev/shm")
BYTES_OF_AN_ENGINE = 4 * 2**20
"""Bytes that the Python backend needs for each engine, after it has grown once or twice."""


def check_shared_memory(serving: Mapping[str, Serving], loaded: Iterable[Bundle]) -> Finding:
    """Compare the free shared memory with what the engines need."""
    engines = sum(serving[each.model].instances for each in loaded if each.manifest.served.backend == "python")
    if not engines:
        return Finding("ok", "shared memory", "not needed")
    status = os.statvfs(SHARED_MEMORY)
    free, needed = status.f_bavail * status.f_frsize, engines * BYTES_OF_AN_ENGINE
    text = f"{free / 2**20:.0f} MiB free in {SHARED_MEMORY}, {engines} engines need {needed / 2**20:.0f}"
    if free < needed:
        return Finding("FAIL", "shared memory", text, "start the container with --shm-size 256m")
    return Finding("ok", "shared memory", text)
