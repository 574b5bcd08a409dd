"""The deadline of a request, and cancellation when its client disconnects."""

import asyncio
import sys
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from bertqa.errors import InvalidArgument

T = TypeVar("T")

DEADLINE_HEADER = "x-timeout-ms"
_DEADLINE_HEADER = DEADLINE_HEADER.encode()
MAX_TIMEOUT_MS = 999_999_999
GONE = "bertqa.gone"
"""ASGI extension of our HTTP protocol: a future that completes when the client closes the connection."""


def deadline_of(request: Request, longest_s: float) -> float:
    """Return the deadline of a request that has just arrived, in `time.monotonic` seconds.

    Raises:
        InvalidArgument: the limit in the client's ``x-timeout-ms`` is not a positive whole number.
    """
    wishes = [value for name, value in request.scope["headers"] if name == _DEADLINE_HEADER]
    if wishes:
        wish = wishes[0].decode("latin-1")
        if not (wish.isascii() and wish.isdigit() and len(wish) < 10 and int(wish)):
            raise InvalidArgument(
                (DEADLINE_HEADER,),
                f"must be a whole number of milliseconds from 1 to {MAX_TIMEOUT_MS:,}; got {wish!r:.40}",
            )
        longest_s = min(longest_s, int(wish) / 1000)
    return time.monotonic() + longest_s


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await work, but cancel it when the client closes the connection; uvicorn does not do this itself.

    The work runs in the task of the request, and that task is cancelled: a task for the work would cost a tenth of the
    time of an answer. Read the body of the request first.

    Raises:
        ClientDisconnect: the client disconnected, and the work has ended.
    """
    task = asyncio.current_task()
    assert task
    extension: asyncio.Future[None] | None = request.scope.get("extensions", {}).get(GONE)
    if extension is None:  # a server without our protocol
        gone: asyncio.Future[None] = asyncio.create_task(_disconnected(request.receive))
    else:
        gone = extension
    is_over = was_cancelled = False

    def cancel(_: object) -> None:
        nonlocal was_cancelled
        if not is_over:
            was_cancelled = True
            task.cancel()

    gone.add_done_callback(cancel)
    try:
        return await work
    except asyncio.CancelledError:
        if not was_cancelled:
            raise
        raise ClientDisconnect from None
    finally:
        is_over = True
        if was_cancelled and sys.version_info >= (3, 11):
            task.uncancel()
        gone.remove_done_callback(cancel)
        if gone is not extension:
            gone.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
