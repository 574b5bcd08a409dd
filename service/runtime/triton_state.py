"""Query the models of a running Triton over HTTP, and watch the processes of its engines."""

import http.client
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from service.runtime.processes import is_living, living_children
from service.runtime.triton_install import TritonError
from service.runtime.triton_log import load_failure, plain

_LOOK_S = 5.0  # between two checks for new processes


class TritonState:
    """Queries one server over its HTTP port."""

    def __init__(self, host: str, port: int) -> None:
        """Name the address."""
        self._host = host
        self._port = port

    def index(self) -> list[dict[str, str]] | None:
        """Return every version that the server knows, with its state; None during its start, when it does not answer.

        Each has ``name``, ``version``, ``state`` (READY, LOADING, UNLOADING, UNAVAILABLE) and ``reason``.
        """
        found = self._ask("POST", "/v2/repository/index")
        return found if isinstance(found, list) else None

    def engines(self) -> int:
        """Return how many processes should run engines, according to the server; 0 if it does not answer."""
        count = 0
        for entry in self.index() or ():
            if entry.get("state") == "READY":
                config = self._ask("GET", f"/v2/models/{entry['name']}/versions/{entry['version']}/config")
                if isinstance(config, dict) and config.get("backend") == "python":
                    count += sum(group["count"] for group in config["instance_group"])
        return count

    def _ask(self, method: str, path: str) -> Any:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=2)
        try:
            connection.request(method, path)
            response = connection.getresponse()
            return json.loads(response.read()) if response.status == 200 else None
        except (OSError, ValueError, http.client.HTTPException):
            return None
        finally:
            connection.close()


class EngineProcesses:
    """The processes of the Python backend, one for each engine.

    They are children of the server and change with versions, but there must be one for each engine that is ready.
    """

    def __init__(self, server: int) -> None:
        """Name the server's process."""
        self._server = server
        self._known: frozenset[int] = frozenset()
        self._looked = -math.inf
        self._short = False

    def one_is_missing(self, engines: Callable[[], int]) -> bool:
        """Return whether processes were missing in two checks in a row; checks after a death or some seconds."""
        now = time.monotonic()
        if not self._short and now - self._looked < _LOOK_S and all(map(is_living, self._known)):
            return False
        self._looked, self._known = now, living_children(self._server)
        short_before, self._short = self._short, len(self._known) < engines()
        return short_before and self._short


def models_of(repository: Path) -> list[str]:
    """Return the names of the models that Triton loads.

    Raises:
        TritonError: no model has a built version; the message gives the build command.
    """
    found = (path.parent for path in sorted(repository.glob("*/config.pbtxt")))
    models = [directory.name for directory in found if any(directory.glob("[1-9]*/"))]
    if not models:
        build = f"run `{Path(sys.executable).name} -m engine_builder --checkpoint DIR --target cpu` to build one"
        raise TritonError(f"{repository}: holds no built version; {build}")
    return models


def failures(models: Sequence[str], index: Sequence[dict[str, str]], log: Sequence[str]) -> list[str]:
    """Return a sentence for each model without a ready version, from the server's index and its last log lines."""
    sentences = []
    for model in models:
        versions = [entry for entry in index if entry["name"] == model]
        if not any(entry.get("state") == "READY" for entry in versions):
            reasons = [entry["reason"] for entry in versions if entry.get("reason", "unloaded") != "unloaded"]
            reason = plain(reasons[0]) if reasons else load_failure(log) or "no reason given"
            sentences.append(f"model {model} could not be loaded: {reason}")
    return sentences


def listed(models: Sequence[str]) -> str:
    """Return the subject and verb of a sentence about models."""
    return f"model {models[0]} is" if len(models) == 1 else f"models {', '.join(models)} are"
