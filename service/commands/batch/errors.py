"""How a batch job can fail; the messages are sentences for the person who started it."""


class BatchRefused(Exception):
    """The job cannot start as requested; the message names the flag or the file."""


class BatchStopped(Exception):
    """The job cannot continue; finished parts stay finished. The message says why."""
