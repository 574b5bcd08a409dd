"""Asks for an API key where one is needed, and keeps each key to its rate."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.errors import RateLimited, Unauthorized
from service.api_keys import Key, Keyring
from service.observability.metrics import Metrics
from service.observability.request_context import request_context
from service.settings import Settings


def needs_key(method: str, path: str, settings: Settings) -> bool:
    """Return whether a service with keys answers this only to those who have one."""
    if method not in ("GET", "HEAD"):
        return True
    access = {"/metrics": settings.metrics, "/openapi.json": settings.docs}.get(path)
    if access:
        return access != "open"
    # The pages themselves are open; what they ask for needs the key.
    return path not in ("/", "/docs") and not path.startswith(("/health/", "/static/"))


class AuthMiddleware:
    """Lets pass what is open to all, or comes with a key and within the key's rate.

    Raises `Unauthorized` or `RateLimited`; must be inside of the middleware that answers these.
    """

    def __init__(self, app: ASGIApp, *, keyring: Keyring, metrics: Metrics, settings: Settings) -> None:
        self.app = app
        self._keyring = keyring
        self._metrics = metrics
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] == "http" and needs_key(scope["method"], scope["path"], self._settings):
            key = self._admit(Headers(scope=scope))
            context = request_context.get()
            context.api_key, context.charge = key.name, key.charge
        await self.app(scope, receive, send)

    def _admit(self, headers: Headers) -> Key:
        """Return the key that came with a request.

        Raises:
            Unauthorized: the key is missing or unknown, or a header that may hold it is repeated, of which a proxy may
                have looked at the other.
            RateLimited: it has been used too often.
        """
        for name in ("authorization", "x-api-key"):
            if len(headers.getlist(name)) > 1:
                raise Unauthorized(f"{name}: stands twice among the headers")
        scheme, _, credentials = headers.get("authorization", "").partition(" ")
        presented = headers.get("x-api-key") or (credentials.strip() if scheme.lower() == "bearer" else "")
        if not presented:
            raise Unauthorized("an API key is needed: authorization: Bearer KEY, or x-api-key: KEY")
        key = self._keyring.find(presented.encode("latin-1"))
        if key is None:
            raise Unauthorized("this API key is not known")
        wait_s = key.take()
        self._metrics.admitted(key.name, not wait_s)
        if wait_s:
            raise RateLimited(key.name, key.rate, key.unit, wait_s)
        return key
