"""Which pages of other origins may ask from a browser."""

from collections.abc import Callable
from pathlib import Path

from fastapi import FastAPI

from tests.support.asking import ASKED, problem
from tests.support.key_clients import connect
from tests.support.servers import serving

MakeApp = Callable[..., FastAPI]
ORIGIN = {"origin": "https://a.example"}
PREFLIGHT = {
    **ORIGIN,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type",
}


def test_other_origins_may_not_ask_unless_they_are_named(make_app: MakeApp, keys_file: Path, key: str) -> None:
    with serving(make_app()) as url, connect(url) as client:
        for response in (
            client.options("/v1/answer", headers=PREFLIGHT),
            client.post("/v1/answer", json=ASKED, headers=ORIGIN),
        ):
            assert not [name for name in response.headers if name.startswith("access-control")]
    origins = "https://a.example, http://localhost:3000"
    with (
        serving(make_app(cors_origins=origins, api_keys_file=str(keys_file))) as url,
        connect(url, key) as client,
        connect(url) as stranger,
    ):
        allowed = stranger.options("/v1/answer", headers=PREFLIGHT)  # browsers send no key with it
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://a.example"
        assert "authorization" in allowed.headers["access-control-allow-headers"]
        refused = stranger.options("/v1/answer", headers={**PREFLIGHT, "origin": "https://a.example.evil"})
        assert "Disallowed CORS origin" in problem(refused, 400, "cross_origin")
        assert "access-control-allow-origin" not in refused.headers
        answered = client.post("/v1/answer", json=ASKED, headers=ORIGIN)
        assert answered.headers["access-control-allow-origin"] == "https://a.example"
        assert "x-request-id" in answered.headers["access-control-expose-headers"]
        assert "access-control-allow-credentials" not in answered.headers
        unknown = stranger.post("/v1/answer", json=ASKED, headers=ORIGIN)
        problem(unknown, 401, "unauthorized")
        assert unknown.headers["access-control-allow-origin"] == "https://a.example"  # so that a page can read it
