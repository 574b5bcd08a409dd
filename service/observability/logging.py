"""Logging of the service, the launcher and Triton: one line per record, as JSON or text, with the request id.

A thread writes the lines to standard error or output. If a pipe is full, a disk is full or the descriptor is closed,
lines are lost and counted, but no request is blocked or fails.

Unless `Settings.log_texts` allows it, no line contains a question or a context. Exceptions are logged with their type
and location but without their message, which may quote input. Records of other libraries are logged without their
arguments.
"""

import logging
import os
import re
import select
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from logging.handlers import QueueHandler, QueueListener
from queue import Empty, Full, SimpleQueue
from typing import Any

from pythonjsonlogger.json import JsonFormatter as JsonLines

from service.observability.request_context import request_context
from service.settings import Settings

LAUNCHER, TRITON, BUILDER, OUTPUT = "bertqa.launcher", "triton", "bertqa.builder", "bertqa.output"
"""Loggers for messages of the launcher, and for output lines of its children: Triton, the builder, and direct output of
the service's process. The text format shows these lines unchanged."""
DESCRIPTORS = {"stdout": 1, "stderr": 2}
"""File descriptors of the possible log targets."""

_GATHER_S = 0.02  # time for which a line waits for others
_FLUSH_S = 2.0
_PENDING_BYTES = 16 * 1024 * 1024
_OURS = ("bertqa", "triton", "uvicorn", "opentelemetry")
_WARNING_PLACE = re.compile(r".*?:\d+: \w+")  # of "file:line: Category: message"


class LineWriter(QueueHandler):
    """Formats records in the logging thread, and writes the lines from its own; never blocks, never raises."""

    def __init__(self, descriptor: int = 2, *, count_lost: Callable[[int], object] = lambda count: None) -> None:
        """Set the file descriptor; ``count_lost`` is called with the number of lost records."""
        waiting: SimpleQueue[bytes | None] = SimpleQueue()
        super().__init__(waiting)
        self._descriptor = descriptor
        self._count_lost = count_lost
        self._guard = threading.Lock()
        self._pending_bytes = 0
        self._unwritten = 0
        self._lost = 0  # and not yet reported in the log
        self._lines = _BatchListener(waiting, self._write)
        self._lines.start()

    def prepare(self, record: logging.LogRecord) -> bytes:
        """Return the line of a record; formatted here, because only this thread knows the request."""
        return self.format(record).encode(errors="backslashreplace") + b"\n"

    def enqueue(self, line: bytes) -> None:  # type: ignore[override]  # `prepare` makes it
        """Pass a line to the writing thread.

        Raises:
            queue.Full: too many bytes are waiting.
        """
        with self._guard:
            if self._pending_bytes + len(line) > _PENDING_BYTES:
                raise Full
            self._pending_bytes += len(line)
            self._unwritten += 1
        self.queue.put_nowait(line)

    def handleError(self, record: logging.LogRecord) -> None:
        """Count a record that could not be formatted or did not fit into the queue."""
        with self._guard:
            self._lose(1)

    def flush(self) -> None:
        """Wait until all lines are written, for at most two seconds."""
        end = time.monotonic() + _FLUSH_S
        while self._unwritten and time.monotonic() < end:
            time.sleep(0.005)

    def close(self) -> None:
        """End the thread after it has written the remaining lines; does not wait for it."""
        self._lines.enqueue_sentinel()
        super().close()

    def _lose(self, count: int) -> None:
        self._lost += count
        self._count_lost(count)

    def _write(self, lines: Sequence[bytes]) -> None:
        with self._guard:
            self._pending_bytes -= sum(map(len, lines))
            lost, self._lost = self._lost, 0
        written = _write_all(self._descriptor, b"".join([*lines, self._confession(lost)] if lost else lines))
        with self._guard:
            if not written:
                self._lose(len(lines))
                self._lost += lost  # reported with the next line
            self._unwritten -= len(lines)

    def _confession(self, lost: int) -> bytes:
        message = f"{lost} log records were lost"
        return self.prepare(logging.LogRecord("bertqa.service", logging.WARNING, __file__, 0, message, None, None))


class _BatchListener(QueueListener):
    """Takes all available lines at once; under load it wakes fifty times a second, not thousands of times."""

    def __init__(self, queue: "SimpleQueue[bytes | None]", write: Callable[[Sequence[bytes]], None]) -> None:
        super().__init__(queue)
        self._waiting = queue
        self._write = write

    def dequeue(self, block: bool) -> list[bytes] | None:  # type: ignore[override]  # `handle` takes it
        """Return the next lines; None, the sentinel, at the end."""
        if (first := self._waiting.get(block)) is None:
            return None
        time.sleep(_GATHER_S)
        lines = [first]
        with suppress(Empty):
            while (line := self._waiting.get_nowait()) is not None:
                lines.append(line)
            self.enqueue_sentinel()
        return lines

    def handle(self, lines: Sequence[bytes]) -> None:  # type: ignore[override]  # `dequeue` makes them
        """Write lines."""
        self._write(lines)


def _write_all(descriptor: int, data: bytes) -> bool:
    """Write the data; returns whether all of it was written."""
    view = memoryview(data)
    try:
        while view:
            try:
                view = view[os.write(descriptor, view) :]
            except BlockingIOError:  # another process made the descriptor non-blocking
                select.select((), (descriptor,), ())
    except OSError:
        return False
    return True


class _Discreet(logging.Formatter):
    """Base of `JsonFormatter` and `TextFormatter`: decides which parts of a record may be shown."""

    texts: bool

    def message(self, record: logging.LogRecord) -> str:
        """Return the message, or only the part that cannot quote a text."""
        if self.texts or record.name.partition(".")[0] in _OURS:
            return record.getMessage()
        if record.name == "py.warnings":
            found = _WARNING_PLACE.match(record.getMessage())
            return found[0] if found else "a warning"
        return str(record.msg).partition("\n")[0]  # asyncio appends the repr of exceptions; arguments may be anything

    def exception(self, record: logging.LogRecord) -> str:
        """Return types and locations of an exception and its causes; empty if the record has none."""
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


class JsonFormatter(_Discreet, JsonLines):
    """One JSON object per line, in ASCII."""

    def __init__(self, *, texts: bool) -> None:
        """Set whether lines may contain questions and contexts."""
        super().__init__()
        self.texts = texts

    def format(self, record: logging.LogRecord) -> str:
        """Return time, level, logger and message, then request_id, trace_id, exception and own fields if present."""
        request = request_context.get()
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
        return self.serialize_log_record(line)


class TextFormatter(_Discreet):
    """For people: lines of the launcher and Triton unchanged, others with time, level, logger and request."""

    def __init__(self, *, texts: bool) -> None:
        """Set whether lines may contain questions and contexts."""
        super().__init__()
        self.texts = texts

    def format(self, record: logging.LogRecord) -> str:
        """Return one line, with the lines of an exception below it."""
        message = self.message(record)
        if record.name in (TRITON, BUILDER, OUTPUT):
            return message
        if record.name == LAUNCHER:
            return f"bertqa: {message}"
        words = [_time(record), record.levelname, record.name, message]
        if request_id := request_context.get().request_id:
            words.append(f"request_id={request_id}")
        words += [f"{name}={value!r}" for name, value in getattr(record, "fields", {}).items()]
        exception = self.exception(record)
        return " ".join(words) + (f"\n{exception}" if exception else "")


def _time(record: logging.LogRecord) -> str:
    """Return the time as in RFC 3339, in UTC with milliseconds."""
    moment = datetime.fromtimestamp(record.created, timezone.utc)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def configure(settings: Settings, *, count_lost: Callable[[int], object] = lambda count: None) -> None:
    """Send all logs of this process, including warnings and uncaught exceptions, through one `LineWriter`.

    ``count_lost`` is called with the number of records that could not be written.
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
    # No line shows these, and collecting them takes half the time of a record.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    uvicorn = logging.getLogger("uvicorn")
    uvicorn.handlers.clear()
    uvicorn.propagate = True
    logging.captureWarnings(True)
    log = logging.getLogger("bertqa.service")

    def in_thread(args: threading.ExceptHookArgs) -> None:
        log.error("a thread ended by an exception", exc_info=args.exc_value)

    def unraisable(args: "sys.UnraisableHookArgs") -> None:
        log.error("an exception that could not be raised", exc_info=args.exc_value)

    threading.excepthook, sys.unraisablehook = in_thread, unraisable


def flush() -> None:
    """Wait briefly until all records are written, because a process ended by a signal runs no exit handlers."""
    for handler in logging.getLogger().handlers:
        handler.flush()
