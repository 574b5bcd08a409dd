"""What a check of the doctor gives."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "WARN", "FAIL"]
"""In order; ``WARN``: it works, and worse than it could."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of looking at one thing."""

    level: Level
    subject: str  # what was looked at
    text: str
    fix: str = ""  # how to fix it, unless it is ok

    def __str__(self) -> str:
        return f"{self.level:<4}  {self.subject}: {'; '.join(filter(None, (self.text, self.fix)))}"
