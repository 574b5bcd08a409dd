"""The result of a check of the doctor."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "WARN", "FAIL"]
"""Levels by severity; ``WARN`` means that it works, but not well."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check."""

    level: Level
    subject: str  # what was checked
    text: str
    fix: str = ""  # how to fix it; empty if ok

    def __str__(self) -> str:
        return f"{self.level:<4}  {self.subject}: {'; '.join(filter(None, (self.text, self.fix)))}"
