"""Bytes that requests hold, counted so that they cannot come to more than a process may use."""

from collections.abc import Iterator
from contextlib import contextmanager

from service.triton.errors import ModelOverloaded


class MemoryBudget:
    """The bytes of all requests in progress: bodies, texts, windows, logits, and replies not taken by their clients."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.held = 0

    def check(self, more: int = 1) -> None:
        """Return if a request may hold so many bytes more.

        Raises:
            ModelOverloaded: others hold too many.
        """
        if self.held and self.held + more > self.max_bytes:
            raise ModelOverloaded(
                f"Requests in progress hold {self.held >> 20} MiB of memory; they may hold {self.max_bytes >> 20} MiB."
            )

    def open(self) -> "Account":
        """An account for what one request holds, which is to be closed."""
        return Account(self)

    @contextmanager
    def account(self) -> Iterator["Account"]:
        """What one request holds; given back at the end."""
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
            ModelOverloaded: there is no room for it beside what others hold.
        """
        if self._budget.held > self._bytes:  # whoever is alone may
            self._budget.check(number)
        self._bytes += number
        self._budget.held += number

    def close(self) -> None:
        """Give all back."""
        self._budget.held -= self._bytes
        self._bytes = 0
