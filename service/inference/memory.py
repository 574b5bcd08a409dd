"""One account of the memory that requests hold, so that all together cannot exceed what a process may use."""

from collections.abc import Iterator
from contextlib import contextmanager

from service.triton.errors import EngineOverloaded


class MemoryBudget:
    """The bytes of all requests in progress, each counted once.

    Bodies, from their first byte on, are counted by the HTTP protocol (`hold_body`); texts, windows, logits, and
    replies that their clients have not taken, by whoever makes them, on the `Account` of a request.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.body_bytes = 0
        """Bytes of bodies that have arrived, whole or in part."""
        self.held = 0
        """All other bytes."""

    def hold_body(self, more: int) -> None:
        """Count bytes of a body that arrived, or, below zero, of one that is let go; never refused here."""
        self.body_bytes += more

    def check(self, more: int = 1) -> None:
        """Return if a request may hold so many bytes more.

        Raises:
            EngineOverloaded: others hold too many.
        """
        total = self.body_bytes + self.held
        if self.held and total + more > self.max_bytes:
            raise EngineOverloaded(
                f"Requests in progress hold {total >> 20} MiB of memory; they may hold {self.max_bytes >> 20} MiB."
            )

    def open(self) -> "Account":
        """Return an account for what one request holds; close it at the end."""
        return Account(self)

    @contextmanager
    def account(self) -> Iterator["Account"]:
        """Open an account, and close it at the end."""
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
        """Hold more.

        Raises:
            EngineOverloaded: there is no room for it beside what others hold; a request alone always has room.
        """
        if self._budget.held > self._bytes:
            self._budget.check(number)
        self._bytes += number
        self._budget.held += number

    def close(self) -> None:
        """Give all back."""
        self._budget.held -= self._bytes
        self._bytes = 0
