"""Run independent pieces of work in several processes."""

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
    """Run all pieces of work; yield each with its result when it is done, in any order.

    The first error stops everything; pieces that have not started are not run.

    Args:
        work: a module-level function, so that new processes can import it; must not depend on earlier calls.
        pieces: pieces of work; picklable.
        processes: number of concurrent processes; 1 runs in this process.

    Raises:
        DataError: a process died.
    """
    if processes == 1 or len(pieces) < 2:
        for piece in pieces:
            yield piece, work(piece)
        return
    # Spawned, because a fork would copy the locks of Arrow's and the tokenizers' threads.
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
    """End this process when its parent is gone: a killed parent cannot stop its pool, which would wait forever."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()
