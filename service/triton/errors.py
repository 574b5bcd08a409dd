"""What can go wrong with an engine call.

The tree::

    ModelError
    ├── ModelUnavailable    no connection, or the circuit is open
    │   └── ModelNotLoaded  the server answers, but has not loaded the model
    ├── ModelTimeout        the deadline passed
    ├── ModelOverloaded     too many calls wait, here or in Triton
    └── ModelBroken         the engine failed, or its output is not usable

`service.triton.replica` translates every error of gRPC into it, once.
"""


class ModelError(Exception):
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


class ModelUnavailable(ModelError):
    """There is no connection to Triton, or it failed a moment ago and is not called."""


class ModelNotLoaded(ModelUnavailable):
    """Triton answers, but does not serve this model now."""


class ModelTimeout(ModelError):
    """The deadline passed before the engine answered."""


class ModelOverloaded(ModelError):
    """Too many calls wait for the engine; try again a little later."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        """Say what is full, and after how many seconds to try again."""
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ModelBroken(ModelError):
    """The engine answered with an error, or with something that cannot be the logits of the window."""
