"""Require API keys and limit their rates."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.errors import RateLimited, Unauthorized
from service.api_keys import Key, Keyring
from service.observability.metrics import Metrics
from service.observability.request_context import request_context
from service.settings import Settings


def needs_key(method: str, path: str, settings: Settings) -> bool:
    """Return whether a service with API keys requires one for this request."""
    if method not in ("GET", "HEAD"):
        return True
    access = {"/metrics": settings.metrics, "/openapi.json": settings.docs}.get(path)
    if access:
        return access != "open"
    # The pages are open; the requests that they make need a key.
    return path not in ("/", "/docs") and not path.startswith(("/health/", "/static/"))


class AuthMiddleware:
    """Passes on requests that need no key, or that have a key within its rate.

    Raises `Unauthorized` or `RateLimited`; must be inside `ErrorMiddleware`, which handles these.
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
        """Return the key of a request.

        Raises:
            Unauthorized: the key is missing or unknown, or its header is repeated (a proxy may have checked the other
                one).
            RateLimited: the key exceeds its rate.
        """
        for name in ("authorization", "x-api-key"):
            if len(headers.getlist(name)) > 1:
                raise Unauthorized(f"{name}: the header is repeated")
        scheme, _, credentials = headers.get("authorization", "").partition(" ")
        presented = headers.get("x-api-key") or (credentials.strip() if scheme.lower() == "bearer" else "")
        if not presented:
            raise Unauthorized("an API key is required; send authorization: Bearer KEY, or x-api-key: KEY")
        key = self._keyring.find(presented.encode("latin-1"))
        if key is None:
            raise Unauthorized("unknown API key")
        wait_s = key.take()
        self._metrics.admitted(key.name, not wait_s)
        if wait_s:
            raise RateLimited(key.name, key.rate, key.unit, wait_s)
        return key
