"""The reply to questions: JSON that is already written, with where the time went."""

from collections.abc import Sequence

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from service.inference.memory import Account
from service.inference.question import Result

LARGE_BYTES = 64 * 1024
"""From this size, a reply is on the account of its request until the client has taken it."""
_CACHE_STATUS = {  # of several questions, that of the one which took most
    "miss": b"bertqa; fwd=miss; stored",
    "coalesced": b"bertqa; fwd=miss; collapsed",
    "hit": b"bertqa; hit",
}
_JSON = (b"content-type", b"application/json")


class Reply(Response):
    """A reply whose bytes, and those of its request, are given back once the client has taken them."""

    account: Account | None = None

    def __init__(self, body: bytes, results: Sequence[Result]) -> None:
        """Take a body of JSON, and the results that it tells of, for its headers.

        These are ``server-timing`` with the stages, each of the slowest question, and with a cache ``cache-status``
        (RFC 9211).
        """
        # Starlette's own constructor would encode each header anew.
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
                # The server waits for the client before it sends more: so there is more, of no bytes.
                await send({**body, "more_body": True})
                await send({"type": "http.response.body", "body": b""})
        finally:
            if self.account:
                self.account.close()
