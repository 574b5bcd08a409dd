"""Threads for work on texts that would block the event loop: tokenizing, decoding, writing replies.

Only questions use them. Reading key and model files and writing metrics have threads of their own, so they go on even
when all threads of this pool are busy.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from service.triton.errors import EngineOverloaded, EngineTimeout

T = TypeVar("T")
Check = Callable[[], None]
"""Called between the steps of work; raises if the result is no longer needed."""


def go_on() -> None:
    """A `Check` that never raises."""


THREADS = 2
"""Number of threads. Python runs one thread at a time, but the tokenizer releases the GIL."""
INLINE_S = 0.002
"""Seconds of work that may run on the event loop."""
LARGE_BYTES = 64 * 1024
"""Bodies and replies from this size on are parsed and written in a thread; smaller ones take under a millisecond."""
_WEIGHT = 1 / 16  # weight of the latest work in the moving average


class Abandoned(Exception):
    """Raised by a `Check`: the deadline passed, or the client disconnected."""


class WorkerPool:
    """A small thread pool with deadlines; for one event loop."""

    def __init__(self, threads: int = THREADS) -> None:
        self.abandoned = 0
        """Number of tasks that no caller waits for but that still run, until their next check."""
        self._threads = threads
        self._executor = ThreadPoolExecutor(threads, "questions")
        self._waiting = 0  # tasks, queued or running, that a caller waits for
        self._mean_s = 0.0

    @property
    def expected_wait(self) -> float:
        """Seconds until new work would start."""
        return max(self._waiting + self.abandoned + 1 - self._threads, 0) * self._mean_s / self._threads

    def check(self, max_wait_s: float) -> None:
        """Check that new work would start in time.

        Raises:
            EngineOverloaded: it would not.
        """
        wait_s = self.expected_wait
        if wait_s > max_wait_s:
            raise EngineOverloaded(
                f"Long texts are waiting to be tokenized: this one would wait {wait_s:.2f} s; the limit is "
                f"{max_wait_s:.2f} s.",
                retry_after_s=wait_s - max_wait_s,
            )

    async def run(self, work: Callable[[Check], T], *, deadline: float) -> T:
        """Run work in a thread, with a deadline in `time.monotonic` seconds.

        If the deadline passes or the caller is cancelled, returns at once; the work stops at its next check.

        Raises:
            EngineTimeout: the deadline passed.
            Exception: any error of the work.
        """
        is_wanted = True

        def check() -> None:
            if not is_wanted or time.monotonic() >= deadline:
                raise Abandoned

        def timed() -> tuple[T, float]:
            check()
            began = time.monotonic()
            return work(check), time.monotonic() - began

        loop = asyncio.get_running_loop()
        self._waiting += 1
        future = self._executor.submit(timed)
        result = asyncio.wrap_future(future)
        result.add_done_callback(_look_at)
        try:
            await asyncio.wait((result,), timeout=min(max(deadline - time.monotonic(), 0), _FOREVER_S))
            if not result.done():
                raise EngineTimeout(_PASSED)
            value, seconds = result.result()
            self._mean_s += (seconds - self._mean_s) * (_WEIGHT if self._mean_s else 1)
            return value
        except Abandoned:
            raise EngineTimeout(_PASSED) from None
        finally:
            self._waiting -= 1
            is_wanted = False
            if not future.done() and not future.cancel():
                self.abandoned += 1
                future.add_done_callback(lambda _: self._forget(loop))

    async def run_if_large(self, size: int, work: Callable[[Check], T], *, deadline: float) -> T:
        """Run work on ``size`` bytes: directly if there are few, otherwise in a thread as `run` does.

        A single long call into C would block the event loop even from a thread, so the work should make several calls.
        """
        return work(go_on) if size < LARGE_BYTES else await self.run(work, deadline=deadline)

    def close(self) -> None:
        """Start no more work."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _forget(self, loop: asyncio.AbstractEventLoop) -> None:
        def forget() -> None:
            self.abandoned -= 1

        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(forget)


_PASSED = "The deadline passed while the texts were being processed."
_FOREVER_S = 1e6


def _look_at(future: "asyncio.Future[Any]") -> None:
    if not future.cancelled():
        future.exception()  # or asyncio would report it as never retrieved


_ASCII_S, _NEAR_S, _ANY_S = 0.8e-6, 1.2e-6, 10e-6
"""Worst-case seconds per character: in ASCII texts without long words; in other texts, of short ASCII words and of the
rest."""
_LONG_WORD = 25


def tokenizing_s(*texts: str) -> float:
    """Estimate the worst-case seconds of tokenizing.

    WordPiece tries every end of a word from every piece on, which is quadratic in the length of words up to a hundred
    letters. Measured with the shipped tokenizer on a 2-core Xeon, per character: 0.3 µs for English, 0.8 µs for the
    worst plain ASCII with words below 25 letters, half as much again if the text must be normalized, and 10 µs for the
    worst words.
    """
    return sum(map(_tokenizing_s, texts))


def _tokenizing_s(text: str) -> float:
    if len(text) * _ANY_S < INLINE_S / 16:
        return len(text) * _ANY_S
    words = text.split()
    if text.isascii() and max(map(len, words), default=0) < _LONG_WORD:
        return len(text) * _ASCII_S
    slow = sum(len(word) for word in words if len(word) >= _LONG_WORD or not word.isascii())
    return len(text) * _NEAR_S + slow * (_ANY_S - _NEAR_S)
