"""A question that the toy model answers, and a check of error replies."""

import httpx

ASKED = {"question": "Who made it?", "context": "It was made at «Uber» by 漢字."}


def problem(response: httpx.Response, status: int, error_type: str, field: str | None = None) -> str:
    assert response.status_code == status, response.text
    body = response.json()
    assert body.keys() == {"error", "error_type", "field"}
    assert (body["error_type"], body["field"]) == (error_type, field), body
    assert response.headers["x-request-id"]
    assert "Traceback" not in body["error"]
    return str(body["error"])


def ask(client: httpx.Client, **fields: object) -> dict[str, object]:
    """Ask ``/v1/answer`` for what must be answered."""
    response = client.post("/v1/answer", json={**ASKED, **fields})
    assert response.status_code == 200, response.text
    found = response.json()
    assert isinstance(found, dict)
    return found
