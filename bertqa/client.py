"""A small HTTP client for our own commands; it waits and retries while the service is busy.

It needs httpx, which the extra ``cli`` installs.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, TypedDict, cast

import httpx

from bertqa.backoff import RETRIED_STATUSES, pause_of, pauses, retry_after_s

DEFAULT_URL = "http://127.0.0.1:8000"
TIMEOUT_S = 60.0
"""Seconds for one call, including retries and the waits between them."""
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class ClientError(Exception):
    """A call failed; the message is a sentence for the user."""


class Unreachable(ClientError):
    """The service sent no reply."""


class Refused(ClientError):
    """The service rejected the request with a status from 400 to 499."""


class ServerFailed(ClientError):
    """The service failed: a status of 500 or above, a reply that is not JSON, or still busy at the timeout."""


class AnswerSpan(TypedDict):
    """An answer: a piece of a context."""

    text: str
    start: int
    end: int
    context_index: int
    score: float


class AnswerReply(TypedDict):
    """The fields of a reply of ``/v1/answer`` that our commands use; docs/api.md lists all of them."""

    answers: list[AnswerSpan]
    has_answer: bool
    null_score: float
    model: str


class _Question(TypedDict):
    question: str
    context: str


class AnswerRequest(_Question, total=False):
    """The fields of a request to ``/v1/answer`` that our commands use."""

    top_k: int
    no_answer: bool
    model: str


class Client:
    """Calls a service over one connection pool; threads can share it."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        key: str | None = None,
        timeout_s: float = TIMEOUT_S,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Set the address; the client connects on first use.

        Args:
            url: of the service.
            key: API key; default: the value of ``BERTQA_API_KEY``.
            timeout_s: seconds for one call, including retries and waits.
            report: called once with a sentence when a call has to wait.

        Raises:
            ValueError: the URL is not an HTTP URL, or the key has characters that cannot be sent.
        """
        self.url = url
        self.retries = 0
        """Number of retries."""
        self.waited_s = 0.0
        """Seconds spent waiting before retries, summed over all threads."""
        self._timeout_s = timeout_s
        self._report = report
        self._lock = threading.Lock()
        key = os.environ.get("BERTQA_API_KEY") if key is None else key
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise ValueError(f"--url {url}: {error}") from error
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ValueError(f"--url {url}: must begin with http:// or https:// and a host")
        if key and not (key.isascii() and key.isprintable()):
            raise ValueError("BERTQA_API_KEY: must be printable ASCII characters")
        self._client = httpx.Client(
            base_url=parsed,
            trust_env=parsed.host not in _LOOPBACK,  # a proxy cannot reach the loopback interface of this machine
            headers={"authorization": f"Bearer {key}"} if key else {},
            limits=httpx.Limits(max_connections=None),
        )

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def answer(self, request: AnswerRequest) -> AnswerReply:
        """Ask one question.

        Raises:
            Unreachable, Refused, ServerFailed: the call failed.
        """
        return cast(AnswerReply, self._call("POST", "/v1/answer", cast(Mapping[str, Any], request)))

    def info(self) -> dict[str, Any]:
        """Return ``/info``: the model, its limits and the versions of the service.

        Raises:
            Unreachable, Refused, ServerFailed: the call failed.
        """
        return self._call("GET", "/info", None)

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        end = time.monotonic() + self._timeout_s
        for pause_s in pauses():
            wait_s = pause_s
            try:
                left_s = max(end - time.monotonic(), 0.001)
                response = self._client.request(method, path, json=body, timeout=left_s)
            except httpx.TransportError as error:
                failure: ClientError = Unreachable(f"{self.url}: {error or type(error).__name__}")
                hint = "; is `bertqa serve` running?"
            except httpx.RequestError as error:
                raise ServerFailed(f"{self.url}{path}: {error or type(error).__name__}") from error
            else:
                if response.status_code not in RETRIED_STATUSES:
                    return self._read(response, path)
                failure, hint = ServerFailed(self._problem(response, path)), ""
                wait_s = pause_of(pause_s, retry_after_s(response.headers.get("retry-after")))
            left_s = end - time.monotonic()
            if wait_s >= left_s:
                raise type(failure)(f"{failure}{hint} Gave up after {self._timeout_s - max(left_s, 0):.0f} s.")
            self._note(f"{failure}{hint} Trying again for up to {self._timeout_s:g} s.", wait_s)
            time.sleep(wait_s)
        raise AssertionError("pauses never end")

    def _note(self, line: str, wait_s: float) -> None:
        with self._lock:
            first = not self.retries
            self.retries += 1
            self.waited_s += wait_s
        if first:
            self._report(line)

    def _read(self, response: httpx.Response, path: str) -> dict[str, Any]:
        if response.is_server_error:
            raise ServerFailed(self._problem(response, path))
        if response.is_error:
            raise Refused(self._problem(response, path))
        try:
            reply = response.json()
        except ValueError:
            reply = None
        if not isinstance(reply, dict):
            raise ServerFailed(f"{self.url}{path}: status {response.status_code}, not a JSON object")
        return reply

    def _problem(self, response: httpx.Response, path: str) -> str:
        """Return the error message of the service, or the status if the reply has none."""
        try:
            message = response.json()["error"]
        except (ValueError, TypeError, KeyError):
            return f"{self.url}{path}: status {response.status_code}, not a reply of this service."
        return f"{str(message).rstrip('.')} (status {response.status_code})."
