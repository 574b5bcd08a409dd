"""The reply to questions: serialized JSON, with timings in its headers."""

from collections.abc import Sequence

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from service.inference.memory import Account
from service.inference.question import Result

LARGE_BYTES = 64 * 1024
"""Replies from this size on count on the account of their request until the client has read them."""
_CACHE_STATUS = {  # of the question that took most work
    "miss": b"bertqa; fwd=miss; stored",
    "coalesced": b"bertqa; fwd=miss; collapsed",
    "hit": b"bertqa; hit",
}
_JSON = (b"content-type", b"application/json")


class Reply(Response):
    """A reply that frees its account once the client has read it."""

    account: Account | None = None

    def __init__(self, body: bytes, results: Sequence[Result]) -> None:
        """Set the JSON body, and the headers from the results.

        The headers are ``server-timing``, with the slowest question of each stage, and with a cache ``cache-status``
        (RFC 9211).
        """
        # Starlette's constructor would encode each header again.
        self.status_code, self.background, self.body = 200, None, body
        timing = b"tokenize;dur=%.3f, infer;dur=%.3f, decode;dur=%.3f" % (
            max(each.tokenize_s for each in results) * 1000,
            max(each.infer_s for each in results) * 1000,
            max(each.decode_s for each in results) * 1000,
        )
        self.raw_headers = [_JSON, (b"content-length", b"%d" % len(body)), (b"server-timing", timing)]
        sources = {each.source for each in results}
        for source, status in _CACHE_STATUS.items():
            if source in sources:
                self.raw_headers.append((b"cache-status", status))
                break

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            body: Message = {"type": "http.response.body", "body": self.body}
            if len(self.body) < LARGE_BYTES:
                await send(body)
            else:
                # The server waits for the client before it sends more, so send another message without bytes.
                await send({**body, "more_body": True})
                await send({"type": "http.response.body", "body": b""})
        finally:
            if self.account:
                self.account.close()
