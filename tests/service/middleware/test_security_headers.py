"""Every response is hardened, whoever answers."""

import httpx

from tests.support.asking import ASKED


def test_errors_and_files_are_hardened_too(shared_client: httpx.Client) -> None:
    for response in (
        shared_client.get("/health/live"),
        shared_client.get("/nowhere"),
        shared_client.post("/v1/answer", json=ASKED),
    ):
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        assert response.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")


def test_every_response_is_hardened(shared_client: httpx.Client) -> None:
    for path in ("/", "/docs", "/static/page.js", "/v1/answer", "/no/such/path", "/health/live"):
        headers = shared_client.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-opener-policy"] == headers["cross-origin-resource-policy"] == "same-origin"
        assert "camera=()" in headers["permissions-policy"]
        assert "server" not in headers or headers["server"] == "uvicorn"  # `bertqa serve` tells none
