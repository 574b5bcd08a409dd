"""Clients of a service with API keys."""

import httpx


def connect(url: str, key: str = "") -> httpx.Client:
    return httpx.Client(
        base_url=url, trust_env=False, timeout=30, headers={"authorization": f"Bearer {key}"} if key else {}
    )
