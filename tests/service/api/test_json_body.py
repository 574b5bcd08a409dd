"""JSON bodies are read strictly, whatever the route."""

import json

import httpx
import pytest

from tests.support.asking import ASKED, problem


@pytest.mark.parametrize(
    ("body", "status", "error_type", "field"),
    [
        (b"", 400, "malformed_json", None),
        (b"  ", 400, "malformed_json", None),
        (b"{", 400, "malformed_json", None),
        (b'{"question": "a", "context": "b"} x', 400, "malformed_json", None),
        (b'{"question": "a", "context": "b", "top_k": NaN}', 400, "malformed_json", None),
        (b'{"question": "a", "context": "b", "top_k": 1e400}', 422, "validation", "top_k"),
        (b'{"question": "a", "context": "b", "top_k": ' + b"9" * 5000 + b"}", 400, "malformed_json", None),
        (b'{"question": "a", "question": "b", "context": "b"}', 400, "malformed_json", None),
        (json.dumps({f"f{n}": 1 for n in range(70)}).encode(), 400, "malformed_json", None),
        ('{"question": "é", "context": "b"}'.encode("latin-1"), 400, "malformed_json", None),
        ('{"question": "a", "context": "b"}'.encode("utf-16"), 400, "malformed_json", None),
        (b"[" * 100_000, 400, "malformed_json", None),
        (b"[1]", 422, "validation", "body"),
        (b"null", 422, "validation", "body"),
        (b'"text"', 422, "validation", "body"),
        (b'{"question": "\\ud800", "context": "b"}', 422, "validation", "question"),
        (b'{"question": "a", "contexts": ["b", "\\udfff"]}', 422, "validation", "contexts[1]"),
        (b'{"\\ud800": "a", "question": "a", "context": "b"}', 422, "validation", "\\ud800"),
        (b'{"context": "b"}', 422, "validation", "question"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/answer", "/predict"])
def test_a_body_that_is_not_valid(
    shared_client: httpx.Client, path: str, body: bytes, status: int, error_type: str, field: str | None
) -> None:
    response = shared_client.post(path, content=body, headers={"content-type": "application/json"})
    if path == "/v1/answer" and field != "\\ud800":
        problem(response, status, error_type, field)
    else:  # another schema, or a name that cannot be written as it came: still an error of the same kind
        assert response.status_code == status
        assert response.json()["error_type"] == error_type


def test_a_byte_order_mark_and_a_plus_json_type_are_welcome(shared_client: httpx.Client) -> None:
    body = b"\xef\xbb\xbf" + json.dumps(ASKED).encode()
    response = shared_client.post(
        "/v1/answer", content=body, headers={"content-type": "application/ld+json; charset=utf-8"}
    )
    assert response.status_code == 200


def test_a_content_type_that_is_not_json(shared_client: httpx.Client) -> None:
    assert "none" in problem(shared_client.post("/v1/answer", content=b"{}"), 415, "not_json")
    assert "x-www-form-urlencoded" in problem(shared_client.post("/", data={"a": "b"}), 415, "not_json")
