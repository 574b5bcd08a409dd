"""Independent pieces of work, done by some processes."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import TypeVar

from training.data.documents import DataError

_Piece = TypeVar("_Piece")
_Result = TypeVar("_Result")


def each(
    work: Callable[[_Piece], _Result], pieces: Sequence[_Piece], processes: int
) -> Iterator[tuple[_Piece, _Result]]:
    """Do each piece of work, and give it with its result as it is done, in any order.

    The first error ends it: what has not begun is not done any more.

    Args:
        work: a function of a module, so that a new process finds it; does not depend on what it did before.
        pieces: of work, picklable.
        processes: at once; 1 works in this very process.

    Raises:
        DataError: a process died.
    """
    if processes == 1 or len(pieces) < 2:
        for piece in pieces:
            yield piece, work(piece)
        return
    # Spawned: a fork would copy the locks of the threads that Arrow and the tokenizers have by then.
    context = get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(pieces)), context, initializer=_end_with_parent) as pool:
        jobs = {pool.submit(work, piece): piece for piece in pieces}
        try:
            for job in as_completed(jobs):
                yield jobs.pop(job), job.result()
        except BrokenProcessPool as error:
            raise DataError("a process died, out of memory or killed; the same command goes on") from error
        finally:
            pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """End this process when its parent is gone: one that is killed tells nobody, and its pool would wait for ever."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()
