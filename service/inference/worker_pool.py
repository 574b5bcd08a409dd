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
"""Called between the steps of some work; raises when nobody wants its result any more."""


def go_on() -> None:
    """Be a `Check` of work that runs to its end."""


THREADS = 2
"""Texts worked on at one time. Python runs one thread at a time; the tokenizer runs beside it."""
INLINE_S = 0.002
"""Seconds of work that may be done on the event loop."""
LARGE_BYTES = 64 * 1024
"""From this size, bodies are parsed and replies written in a thread; less takes under a millisecond."""
_WEIGHT = 1 / 16  # of the latest work in the mean


class Abandoned(Exception):
    """Raised by `Check`: the deadline has passed, or the client has gone."""


class WorkerPool:
    """A few threads; for one event loop."""

    def __init__(self, threads: int = THREADS) -> None:
        self.abandoned = 0
        """Work that goes on though nobody waits for it, for it cannot be stopped between its steps."""
        self._threads = threads
        self._executor = ThreadPoolExecutor(threads, "questions")
        self._waiting = 0  # work begun or not whose request waits for it
        self._mean_s = 0.0

    @property
    def expected_wait(self) -> float:
        """Seconds until work that comes now would begin."""
        return max(self._waiting + self.abandoned + 1 - self._threads, 0) * self._mean_s / self._threads

    def check(self, max_wait_s: float) -> None:
        """Return if work that comes now would begin in time.

        Raises:
            EngineOverloaded: it would not.
        """
        wait_s = self.expected_wait
        if wait_s > max_wait_s:
            raise EngineOverloaded(
                f"Long texts are waiting to be tokenized: this one would wait {wait_s:.2f} s, and may wait "
                f"{max_wait_s:.2f} s.",
                retry_after_s=wait_s - max_wait_s,
            )

    async def run(self, work: Callable[[Check], T], *, deadline: float) -> T:
        """Run work in a thread, until the deadline in `time.monotonic` seconds at most.

        The work is told to stop when the deadline passes or the caller is cancelled, and is not waited for then.

        Raises:
            EngineTimeout: the deadline passed first.
            Exception: whatever the work raises.
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
        """Run work on ``size`` bytes: at once if there are few, else in a thread, as `run` does.

        One call into C keeps the event loop waiting all the same, so the work should consist of several.
        """
        return work(go_on) if size < LARGE_BYTES else await self.run(work, deadline=deadline)

    def close(self) -> None:
        """Begin no more work."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _forget(self, loop: asyncio.AbstractEventLoop) -> None:
        def forget() -> None:
            self.abandoned -= 1

        with suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(forget)


_PASSED = "The deadline passed while the texts were being worked on."
_FOREVER_S = 1e6


def _look_at(future: "asyncio.Future[Any]") -> None:
    if not future.cancelled():
        future.exception()  # so that asyncio does not complain of one that nobody waited for


_ASCII_S, _NEAR_S, _ANY_S = 0.8e-6, 1.2e-6, 10e-6
"""Worst seconds a character: of an ASCII text without long words, of such words in another text, of all others."""
_LONG_WORD = 25


def tokenizing_s(*texts: str) -> float:
    """Estimate the seconds that tokenizing takes at worst.

    WordPiece tries every ending of a word from every piece on: the square of the word's length, up to a hundred
    letters. Measured with the shipped tokenizer on a 2-core Xeon: 0.3 µs a character for English, 0.8 for the worst
    plain ASCII of words below 25 letters, a half more where the text must be normalized, 10 for the worst words of all.
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
