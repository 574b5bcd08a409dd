"""Interpret the lines of Triton's log."""

import logging
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass

_PROBLEM = re.compile(r"(?P<level>[WEF])\d{4} \S+ \d+ [\w./]+:\d+\] (?P<text>.*)")
_LEVELS = {"W": logging.WARNING, "E": logging.ERROR, "F": logging.CRITICAL}
_ERROR = re.compile(r"error: |[EF]\d{4} ", re.IGNORECASE)
# Logged on every machine without a GPU, or repeated in the error that ends the start.
_HARMLESS = re.compile(
    r"[Uu]nable to allocate pinned|failed to allocate pinned|CudaDriverHelper has not|DCGM unable to start"
    r"|Failed to initialize NVML|Failed to create instance|failed to load"
)
_LOAD_FAILED = re.compile(
    r"(?:failed to load '[^']*' version \d+|Poll failed for model directory '[^']*'): (?P<reason>.*)"
)
_PORT_TAKEN = re.compile(r"[Aa]ddress already in use|Socket '[^']*' already in use|failed to start \w+ service")


@dataclass(frozen=True, slots=True)
class Death:
    """Why a server ended."""

    reason: str
    port_taken: bool = False


def level_of(line: str) -> int:
    """Return the level of a line, as a number of `logging`."""
    found = _PROBLEM.match(line)
    return _LEVELS[found["level"]] if found else logging.INFO


def problem_in(line: str) -> str:
    """Return the text of a warning or error that the user should see, else an empty string."""
    found = _PROBLEM.match(line)
    return plain(found["text"]) if found and not _HARMLESS.search(line) else ""


def load_failure(lines: Sequence[str]) -> str:
    """Return why a model could not be loaded, from the last lines of a log; empty if they do not say."""
    found = _LOAD_FAILED.search("\n".join(lines))
    return plain(found["reason"]) if found else ""


def death(code: int | None, lines: Sequence[str], log_file: object) -> Death:
    """Return why a server ended, from its exit code and the last lines of its log."""
    see = f"see {log_file}"
    if failure := load_failure(lines):
        return Death(f"a model could not be loaded: {failure}; {see}")
    if _PORT_TAKEN.search("\n".join(lines)):
        return Death(f"one of its ports is taken; {see}", port_taken=True)
    if code is not None and code < 0:
        return Death(f"the server was killed by {signal.Signals(-code).name}; {see}")
    errors = (line for line in reversed(lines) if _ERROR.match(line) and not _HARMLESS.search(line))
    return Death(f"the server ended with exit code {code} ({plain(next(errors, 'no reason given'))}); {see}")


def plain(text: str) -> str:
    """One line of a log message, without quotes and escapes."""
    return " ".join(text.strip().strip('"').replace("\\n", "\n").split())
