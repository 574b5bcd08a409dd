"""Run a child process of the launcher, and log the lines that it writes."""

import contextlib
import logging
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from service.observability import logging as logs
from service.runtime.processes import die_with_parent, end_session
from service.settings import Settings


@contextlib.contextmanager
def child(
    command: Sequence[str], environment: Mapping[str, str], logger: str, *, end_s: float, cwd: Path | None = None
) -> "Iterator[subprocess.Popen[bytes]]":
    """Run a process that ends when we end; it has `end_s` seconds to do so.

    If the log is JSON, every line of its output becomes JSON too, because gRPC's core bypasses all loggers. The log of
    the service bypasses this: it goes directly where ours goes, so that it never blocks and can count lost lines.
    """
    settings = Settings.from_environment(environment)
    options: dict[str, Any] = {}
    if settings.log_format == "json":
        environment = {**environment, "BERTQA_LOG_TO": "stdout", "TQDM_DISABLE": "1"}
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        if logger == logs.OUTPUT:
            options = {"stdout": logs.DESCRIPTORS[settings.log_to], "stderr": subprocess.PIPE}
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        start_new_session=True,  # only we get Ctrl-C, and end processes in order
        preexec_fn=die_with_parent(signal.SIGTERM),  # noqa: PLW1509  calls nothing that takes a lock
        **options,
    )
    reader = threading.Thread(target=_log_lines, args=(process, logger), name="lines", daemon=True)
    reader.start()
    try:
        yield process
    finally:
        end_session(process, end_s)
        reader.join(5)


def _log_lines(process: "subprocess.Popen[bytes]", logger: str) -> None:
    level = logging.WARNING if logger == logs.OUTPUT else logging.INFO
    for output in filter(None, (process.stderr, process.stdout)):
        with output:
            for line in output:
                if text := line.decode(errors="replace").strip():
                    logging.getLogger(logger).log(level, "%s", text)
