"""What can go wrong with an engine call.

The tree::

    EngineError
    ├── EngineUnavailable    no connection, or the circuit is open
    │   └── EngineNotLoaded  the server answers, but has not loaded the model
    ├── EngineTimeout        the deadline passed
    ├── EngineOverloaded     too many calls wait, here or in Triton
    └── EngineBroken         the engine failed, or its output is not usable

`service.triton.replica` translates every error of gRPC into it, once.
"""


class EngineError(Exception):
    """The engine gave no usable answer; the message is a plain sentence."""

    def __init__(self, message: str, *, detail: str = "") -> None:
        """Say what went wrong.

        Args:
            message: in our own words.
            detail: what the engine said, which may be any text.
        """
        super().__init__(f"{message}: {detail}" if detail else message)
        self.plain = message
        """The message without the engine's own words, safe to log."""


class EngineUnavailable(EngineError):
    """There is no connection to Triton, or it failed a moment ago and is not called."""


class EngineNotLoaded(EngineUnavailable):
    """Triton answers, but does not serve this model now."""


class EngineTimeout(EngineError):
    """The deadline passed before the engine answered."""


class EngineOverloaded(EngineError):
    """Too many calls wait for the engine; try again a little later."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        """Say what is full, and after how many seconds to try again."""
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineBroken(EngineError):
    """The engine answered with an error, or with something that cannot be the logits of the window."""
