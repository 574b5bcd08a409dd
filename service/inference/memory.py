"""Track the memory that requests hold, and limit it for the whole process."""

from collections.abc import Iterator
from contextlib import contextmanager

from service.triton.errors import EngineOverloaded


class MemoryBudget:
    """The bytes of all requests in progress, each counted once.

    The HTTP protocol counts bodies as they arrive (`hold_body`). The code that makes texts, windows, logits and replies
    counts them on the `Account` of the request; replies count until the client has read them.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.body_bytes = 0
        """Bytes of request bodies, complete or partial."""
        self.held = 0
        """All other bytes."""

    def hold_body(self, more: int) -> None:
        """Count bytes of a body that arrived, or a negative number for one that is freed; never raises."""
        self.body_bytes += more

    def check(self, more: int = 1) -> None:
        """Check that a request may hold ``more`` bytes.

        Raises:
            EngineOverloaded: other requests hold too many.
        """
        total = self.body_bytes + self.held
        if self.held and total + more > self.max_bytes:
            raise EngineOverloaded(
                f"Requests in progress hold {total >> 20} MiB of memory; the limit is {self.max_bytes >> 20} MiB."
            )

    def open(self) -> "Account":
        """Return an account for one request; close it at the end."""
        return Account(self)

    @contextmanager
    def account(self) -> Iterator["Account"]:
        """Open an account and close it at the end."""
        account = self.open()
        try:
            yield account
        finally:
            account.close()


class Account:
    """The bytes of one request, or of a part of it."""

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget = budget
        self._bytes = 0

    def add(self, number: int) -> None:
        """Count more bytes.

        Raises:
            EngineOverloaded: other requests hold too many. A request on its own always has room.
        """
        if self._budget.held > self._bytes:
            self._budget.check(number)
        self._bytes += number
        self._budget.held += number

    def close(self) -> None:
        """Free all bytes of the account."""
        self._budget.held -= self._bytes
        self._bytes = 0
