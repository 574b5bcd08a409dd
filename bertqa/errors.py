"""The error for a value that is not acceptable, with the place where the value was given.

Functions of the core name their own argument. Whoever passed it on from a larger object adds the place of that argument
there (`InvalidArgument.within`), and the place becomes text only when somebody reads it (`render`).
"""

from typing import TypeAlias

Location: TypeAlias = tuple[str | int, ...]
"""Names and indices that lead to a value from outside in, like pydantic's ``loc``: ``("questions", 2, "top_k")``."""


class InvalidArgument(ValueError):
    """An argument of a function, or a field of a request, is missing, unknown, of the wrong type or out of range."""

    def __init__(self, location: Location, reason: str) -> None:
        """Say where the value was given and what is wrong with it.

        Args:
            location: of the value; ``()`` for all that was given.
            reason: goes on from "location: ", for example ``must be at least 1; got 0``.
        """
        super().__init__(location, reason)
        self.location = location
        self.reason = reason

    def __str__(self) -> str:
        return f"{render(self.location)}: {self.reason}"

    def within(self, *outer: str | int) -> "InvalidArgument":
        """Return the same problem for a value that is part of a larger one."""
        return InvalidArgument((*outer, *self.location), self.reason)

    def at(self, *location: str | int) -> "InvalidArgument":
        """Return the same problem under another name, where a caller knows the value by one."""
        return InvalidArgument(location, self.reason)


def render(location: Location) -> str:
    """Write a location as a client would: ``questions[2].top_k``; ``body`` for the empty one.

    Names are cut after 60 characters: unknown ones may be of any length.
    """
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part:.60}" if part else '.""'
    return text.removeprefix(".") or "body"
