"""Each request has an id."""

import httpx


def test_request_ids(shared_client: httpx.Client) -> None:
    def sent(**headers: str) -> str:
        return shared_client.get("/health/live", headers={k.replace("_", "-"): v for k, v in headers.items()}).headers[
            "x-request-id"
        ]

    assert sent(x_request_id="mine", x_amzn_trace_id="theirs") == "mine"
    assert sent(x_amzn_trace_id="theirs") == "theirs"
    assert sent(x_request_id="x" * 129, x_amzn_trace_id="theirs") == "theirs"
    assert sent(x_request_id="two words") != sent(x_request_id="two words")
