"""Bodies are bounded before they are parsed."""

from collections.abc import Callable

import httpx
from fastapi import FastAPI

from tests.support.asking import problem
from tests.support.servers import serving

MakeApp = Callable[..., FastAPI]


def test_the_body_is_bounded_before_it_is_parsed(make_app: MakeApp) -> None:
    with serving(make_app(max_body_bytes=1000)) as url, httpx.Client(base_url=url, trust_env=False) as client:
        json_type = {"content-type": "application/json"}
        announced = client.post("/v1/answer", content=b"[" * 1001, headers=json_type)
        assert "1,000 bytes" in problem(announced, 413, "body_too_large")
        chunked = client.post("/", content=(b"[" * 100 for _ in range(11)), headers=json_type)
        problem(chunked, 413, "body_too_large")
        problem(client.post("/", content=b"[" * 1000, headers=json_type), 400, "malformed_json")
