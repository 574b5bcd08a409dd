"""How service, launcher and Triton log: one line a record, as JSON or text, with the id of the request.

Lines go to standard error or output by a thread of their own. A pipe that nobody reads, a full disk or a closed
descriptor loses lines, which are counted, and never holds up or fails a request.

Unless `Settings.log_texts` allows it, no line holds a question or a context: an exception is logged by its type and
place without its message, which may quote its input, and of other libraries' records only what cannot quote.
"""

import json
import logging
import os
import re
import select
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

from service.record import current_record
from service.settings import Settings

LAUNCHER, TRITON, BUILDER, OUTPUT = "bertqa.launcher", "triton", "bertqa.builder", "bertqa.output"
"""Loggers of what the launcher says, and of the lines of its children: Triton, the builder, and what the service's
process writes past its log. They are shown as they are where the format is text."""
DESCRIPTORS = {"stdout": 1, "stderr": 2}
"""Of the places where a log may go."""

_GATHER_S = 0.02  # a line may wait so long for others: under load, the writer wakes fifty times a second, not thousands
_FLUSH_S = 2.0
_PENDING_BYTES = 16 * 1024 * 1024
_OURS = ("bertqa", "triton", "uvicorn", "opentelemetry")
_WARNING_PLACE = re.compile(r".*?:\d+: \w+")  # of "file:line: Category: message"


class LineWriter(logging.Handler):
    """Writes formatted records to a file descriptor from a background thread; never blocks, never raises."""

    def __init__(self, descriptor: int = 2, *, count_lost: Callable[[int], object] = lambda count: None) -> None:
        """Name the descriptor, and what is told the number of records whenever some are lost."""
        super().__init__()
        self._descriptor = descriptor
        self._count_lost = count_lost
        self._guard = threading.Lock()
        self._wake = threading.Event()
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._writing = False
        self._lost = 0  # and not yet told in the log
        self._thread: threading.Thread | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Format a record and leave it to the thread."""
        try:
            line = self.format(record).encode(errors="backslashreplace") + b"\n"
        except Exception:
            line = b""
        with self._guard:
            if not line or self._pending_bytes + len(line) > _PENDING_BYTES:
                self._lose(1)
                return
            self._pending.append(line)
            self._pending_bytes += len(line)
            if not self._thread:
                self._thread = threading.Thread(target=self._write_on, name="log", daemon=True)
                self._thread.start()
        if not self._wake.is_set():
            self._wake.set()

    def flush(self) -> None:
        """Wait until all is written, for two seconds at most."""
        end = time.monotonic() + _FLUSH_S
        while (self._pending or self._writing) and time.monotonic() < end:
            time.sleep(0.005)

    def _lose(self, count: int) -> None:
        self._lost += count
        self._count_lost(count)

    def _write_on(self) -> None:
        while True:
            self._wake.wait()
            time.sleep(_GATHER_S)
            with self._guard:
                self._wake.clear()
                lines, self._pending, self._pending_bytes, self._writing = self._pending, [], 0, True
                lost, self._lost = self._lost, 0
            if lost:
                lines.append(self._confession(lost))
            if not self._write(b"".join(lines)):
                with self._guard:
                    self._lose(len(lines) - bool(lost))
                    self._lost += lost  # still to be told
            self._writing = False

    def _write(self, data: bytes) -> bool:
        view = memoryview(data)
        try:
            while view:
                try:
                    view = view[os.write(self._descriptor, view) :]
                except BlockingIOError:  # somebody made the descriptor non-blocking
                    select.select((), (self._descriptor,), ())
        except OSError:
            return False
        return True

    def _confession(self, lost: int) -> bytes:
        message = f"{lost} log records were lost"
        record = logging.LogRecord("bertqa.service", logging.WARNING, __file__, 0, message, None, None)
        return self.format(record).encode() + b"\n"


class LineFormatter(logging.Formatter):
    """What `JsonFormatter` and `TextFormatter` share: what of a record may be told."""

    def __init__(self, *, texts: bool) -> None:
        """Say whether lines may hold questions and contexts."""
        super().__init__()
        self.texts = texts

    def message(self, record: logging.LogRecord) -> str:
        """The message, or as much of it as cannot quote a text."""
        if self.texts or record.name.partition(".")[0] in _OURS:
            return record.getMessage()
        if record.name == "py.warnings":
            found = _WARNING_PLACE.match(record.getMessage())
            return found[0] if found else "a warning"
        return str(record.msg).partition("\n")[0]  # asyncio appends the repr of exceptions; arguments may be anything

    def exception(self, record: logging.LogRecord) -> str:
        """Types and places of an exception and of those that led to it; empty if the record has none."""
        error = record.exc_info[1] if record.exc_info else None
        if error is None:
            return ""
        if self.texts:
            return "".join(traceback.format_exception(error)).rstrip()
        chain: list[BaseException] = []
        while error is not None and error not in chain:
            chain.append(error)
            error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        parts = [
            f"{''.join(traceback.format_tb(each.__traceback__))}{type(each).__module__}.{type(each).__qualname__}"
            for each in reversed(chain)
        ]
        return "\nwhich led to\n".join(parts)


class JsonFormatter(LineFormatter):
    """One JSON object a line, in ASCII."""

    def format(self, record: logging.LogRecord) -> str:
        """Time, level, logger, message, then what there is of request_id, trace_id, exception and own fields."""
        request = current_record.get()
        line: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": self.message(record),
        }
        for name in ("request_id", "trace_id"):
            if value := getattr(request, name):
                line[name] = value
        line.update(getattr(record, "fields", ()))
        if exception := self.exception(record):
            line["exception"] = exception
        return json.dumps(line, default=str)


class TextFormatter(LineFormatter):
    """For eyes: what the launcher and Triton say as it is, everything else with time, level, logger and request."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and an exception's own lines below it."""
        message = self.message(record)
        if record.name in (TRITON, BUILDER, OUTPUT):
            return message
        if record.name == LAUNCHER:
            return f"bertqa: {message}"
        words = [_time(record), record.levelname, record.name, message]
        if request_id := current_record.get().request_id:
            words.append(f"request_id={request_id}")
        words += [f"{name}={value!r}" for name, value in getattr(record, "fields", {}).items()]
        exception = self.exception(record)
        return " ".join(words) + (f"\n{exception}" if exception else "")


def _time(record: logging.LogRecord) -> str:
    """RFC 3339 in UTC, with milliseconds."""
    moment = datetime.fromtimestamp(record.created, timezone.utc)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def configure(settings: Settings, *, count_lost: Callable[[int], object] = lambda count: None) -> None:
    """Let everything that this process logs, warnings and what Python itself would print included, go one way.

    ``count_lost`` is told the number of records whenever some could not be written.
    """
    writer = LineWriter(DESCRIPTORS[settings.log_to], count_lost=count_lost)
    formatter = JsonFormatter if settings.log_format == "json" else TextFormatter
    writer.setFormatter(formatter(texts=settings.log_texts))
    root = logging.getLogger()
    for handler in [*root.handlers]:
        root.removeHandler(handler)
        handler.close()
    root.addHandler(writer)
    root.setLevel(settings.log_level.upper())
    uvicorn = logging.getLogger("uvicorn")
    uvicorn.handlers.clear()
    uvicorn.propagate = True
    logging.captureWarnings(True)
    log = logging.getLogger("bertqa.service")

    def in_thread(args: threading.ExceptHookArgs) -> None:
        log.error("a thread ended by an exception", exc_info=args.exc_value)

    def unraisable(args: "sys.UnraisableHookArgs") -> None:
        log.error("an exception that nobody could catch", exc_info=args.exc_value)

    threading.excepthook, sys.unraisablehook = in_thread, unraisable


def flush() -> None:
    """Wait, shortly, until what was logged is written: a process that a signal ends runs no exit handlers."""
    for handler in logging.getLogger().handlers:
        handler.flush()
