"""Read and check the fields of a checkpoint's ``config.json``."""

import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine_builder.checkpoint import InvalidCheckpoint


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """The fields of one ``config.json``; every error names the file and the field."""

    path: Path
    values: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> "ConfigFile":
        """Read the file.

        Raises:
            InvalidCheckpoint: the file is missing or is not a JSON object.
        """
        try:
            values = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise InvalidCheckpoint(f"{path}: not readable ({error})") from error
        if not isinstance(values, dict):
            raise InvalidCheckpoint(f"{path}: must be a JSON object")
        return cls(path, values)

    def require(self, field: str, known: object, default: object = None) -> None:
        """Check that a field has the only supported value.

        Raises:
            InvalidCheckpoint: the field has another value.
        """
        if (found := self.values.get(field, default)) != known:
            raise InvalidCheckpoint(f"{self.path}: {field} is {reprlib.repr(found)}; only {known!r} is supported")

    def count(self, field: str) -> int:
        """Return an integer field that must be at least 1.

        Raises:
            InvalidCheckpoint: the field is missing or has another value.
        """
        number = self.values.get(field)
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise InvalidCheckpoint(f"{self.path}: {field} must be a positive integer, not {reprlib.repr(number)}")
        return number

    def epsilon(self, field: str, default: float) -> float:
        """Return a field that must be between 0 and 1: the epsilon that layer normalization adds to the variance.

        Raises:
            InvalidCheckpoint: the field has another value.
        """
        epsilon = self.values.get(field, default)
        if not isinstance(epsilon, float) or not 0 < epsilon < 1:
            raise InvalidCheckpoint(f"{self.path}: {field} must be between 0 and 1, not {reprlib.repr(epsilon)}")
        return epsilon

    def check_heads(self, hidden: str, heads: str) -> None:
        """Check that the hidden size is a multiple of the number of attention heads.

        Raises:
            InvalidCheckpoint: the hidden size is not a multiple.
        """
        if (size := self.count(hidden)) % (number := self.count(heads)):
            raise InvalidCheckpoint(f"{self.path}: {hidden} {size} is not a multiple of {heads} {number}")

    def check_token_types(self) -> None:
        """Check that question and context can have different token types.

        Raises:
            InvalidCheckpoint: there are fewer than two token types.
        """
        if self.count("type_vocab_size") < 2:
            raise InvalidCheckpoint(f"{self.path}: type_vocab_size must be at least 2, for question and context")
