"""The error for an unacceptable value, with the location of the value.

Functions of the core name their own argument. A caller that took the argument from a larger object adds its location in
that object (`InvalidArgument.within`). `render` turns the location into text when the error is shown.
"""

from typing import TypeAlias

Location: TypeAlias = tuple[str | int, ...]
"""Names and indices that lead to a value, outermost first, like pydantic's ``loc``: ``("questions", 2, "top_k")``."""


class InvalidArgument(ValueError):
    """An argument of a function, or a field of a request, is missing, unknown, of the wrong type or out of range."""

    def __init__(self, location: Location, reason: str) -> None:
        """Set the location of the value and what is wrong with it.

        Args:
            location: of the value; ``()`` for the whole input.
            reason: continues "location: ", for example ``must be at least 1; got 0``.
        """
        super().__init__(location, reason)
        self.location = location
        self.reason = reason

    def __str__(self) -> str:
        return f"{render(self.location)}: {self.reason}"

    def within(self, *outer: str | int) -> "InvalidArgument":
        """Return the same error for a value that is part of a larger one."""
        return InvalidArgument((*outer, *self.location), self.reason)

    def at(self, *location: str | int) -> "InvalidArgument":
        """Return the same error for the name by which the caller knows the value."""
        return InvalidArgument(location, self.reason)


def render(location: Location) -> str:
    """Write a location as a client would: ``questions[2].top_k``, or ``body`` if it is empty.

    Names are cut after 60 characters, because unknown names may have any length.
    """
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part:.60}" if part else '.""'
    return text.removeprefix(".") or "body"
