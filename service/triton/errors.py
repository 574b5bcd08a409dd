"""Define the errors of engine calls.

The tree::

    EngineError
    ├── EngineUnavailable    no connection, or the circuit is open
    │   └── EngineNotLoaded  the server answers, but has not loaded the model
    ├── EngineTimeout        the deadline passed
    ├── EngineOverloaded     too many calls wait, here or in Triton
    └── EngineBroken         the engine failed, or its output is not usable

`service.triton.replica` translates every gRPC error into one of these.
"""


class EngineError(Exception):
    """The engine gave no usable answer; the message is a plain sentence."""

    def __init__(self, message: str, *, detail: str = "") -> None:
        """Set the message.

        Args:
            message: in our own words.
            detail: the engine's message, which may contain any text.
        """
        super().__init__(f"{message}: {detail}" if detail else message)
        self.plain = message
        """The message without ``detail``; safe to log."""


class EngineUnavailable(EngineError):
    """There is no connection to Triton, or it failed a moment ago and calls are blocked."""


class EngineNotLoaded(EngineUnavailable):
    """Triton answers, but does not serve this model."""


class EngineTimeout(EngineError):
    """The deadline passed before the engine answered."""


class EngineOverloaded(EngineError):
    """Too many calls are waiting for the engine; try again later."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        """Set the message, and the seconds after which to try again."""
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineBroken(EngineError):
    """The engine answered with an error, or with output that cannot be the logits of the window."""
