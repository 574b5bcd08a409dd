"""Retry pauses for our clients: exponential backoff with jitter.

The HTTP client, the load tests and batch jobs use it.
"""

import random
from collections.abc import Iterator
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime

RETRIED_STATUSES = (429, 503)
"""HTTP statuses that mean "not now"."""


def pauses(first_s: float = 0.1, most_s: float = 2.0) -> Iterator[float]:
    """Yield pauses in seconds, endlessly: each about twice the one before, up to a limit, with jitter of ±50 %."""
    pause_s = first_s
    while True:
        yield random.uniform(0.5, 1.5) * pause_s
        pause_s = min(2 * pause_s, most_s)


def spread(seconds: float) -> float:
    """Lengthen the wait that a service asked for by up to half, so that rejected clients do not return all at once."""
    return random.uniform(1.0, 1.5) * seconds


def pause_of(pause_s: float, asked_s: float | None) -> float:
    """Return the seconds to wait: our own pause, or longer if the service asked for more."""
    return pause_s if asked_s is None else max(spread(asked_s), pause_s)


def retry_after_s(header: str | None) -> float | None:
    """Read a ``retry-after`` header, a number of seconds or a date; returns seconds, or None if it is neither."""
    if header is None:
        return None
    if header.strip().isdigit():
        return float(header)
    try:
        until = parsedate_to_datetime(header)
    except ValueError:
        return None
    return max((until - datetime.now(timezone.utc)).total_seconds(), 0.0) if until.tzinfo else None
