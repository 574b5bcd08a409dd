"""Requests and replies as bytes, compared with what protobuf makes of the same messages."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

from bertqa.windows import INPUT_NAMES, OUTPUT_NAMES
from service.triton.errors import EngineBroken
from service.triton.wire import RequestEncoder, decode_logits
from tests.support.toy_triton import window

LENGTH = 64


@given(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=300),
    st.integers(0, 9),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=300),
    st.floats(-10, 1e9),
    st.sampled_from((1, 32, 64, 512)),
)
def test_a_request_is_what_protobuf_makes_of_the_same_fields(
    model: str, version: int, request_id: str, timeout_s: float, length: int
) -> None:
    encoder = RequestEncoder(model, str(version or ""))
    sent = window(length=length, seed=length)
    expected = service_pb2.ModelInferRequest(
        model_name=model,
        model_version=str(version or ""),
        id=request_id,
        inputs=[{"name": name, "datatype": "INT32", "shape": [1, length]} for name in INPUT_NAMES],
        outputs=[{"name": name} for name in OUTPUT_NAMES],
        raw_input_contents=[tensor.tobytes() for tensor in sent.tensors().values()],
    )
    expected.parameters["timeout"].int64_param = max(int(timeout_s * 1e6), 1)
    for _ in range(2):  # the second time, from what was kept of the first
        encoded = encoder.encode(sent, request_id=request_id, timeout_s=timeout_s)
        assert service_pb2.ModelInferRequest.FromString(encoded) == expected


def reply(**changes: Any) -> Any:
    """A whole reply, and what it is instead."""
    outputs = [{"name": name, "datatype": "FP32", "shape": [1, LENGTH]} for name in OUTPUT_NAMES]
    raw = [np.arange(LENGTH, dtype=np.float32).tobytes(), np.arange(LENGTH, 0, -1, dtype=np.float32).tobytes()]
    return service_pb2.ModelInferResponse(**{"outputs": outputs, "raw_output_contents": raw, **changes})


def test_a_reply_becomes_logits_in_whatever_order_its_outputs_are() -> None:
    whole = reply(model_name="bert_qa", id="r-17")
    turned = reply(outputs=whole.outputs[::-1], raw_output_contents=whole.raw_output_contents[::-1])
    third = {"name": "pooled", "datatype": "FP16", "shape": [3]}
    more = reply(outputs=[third, *whole.outputs], raw_output_contents=[bytes(6), *whole.raw_output_contents])
    for message in (whole, turned, more):
        start, end = decode_logits(message.SerializeToString(), LENGTH)
        assert start.shape == end.shape == (1, LENGTH)
        assert start.dtype == end.dtype == np.float32
        np.testing.assert_array_equal(start[0], np.arange(LENGTH))
        np.testing.assert_array_equal(end[0], np.arange(LENGTH, 0, -1))


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 2e30, -2e30])
@pytest.mark.parametrize("output", [0, 1])
@pytest.mark.parametrize("place", [0, 30, LENGTH - 1])
def test_a_number_that_no_model_means_is_refused_wherever_it_is(number: float, output: int, place: int) -> None:
    tensors = np.zeros((2, LENGTH), np.float32)
    tensors[output, place] = number
    message = reply(raw_output_contents=[tensor.tobytes() for tensor in tensors])
    with pytest.raises(EngineBroken, match=f"{OUTPUT_NAMES[output]!r} holds NaN, infinite or absurdly large"):
        decode_logits(message.SerializeToString(), LENGTH)


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (reply(raw_output_contents=[bytes(4 * LENGTH)]), "has no raw tensors"),
        (reply(outputs=[]), "has no raw tensors"),
        (reply(raw_output_contents=[bytes(4 * LENGTH), bytes(4 * LENGTH - 4)]), r"'end_logits' .* in 252 bytes"),
        (reply(raw_output_contents=[bytes(4 * LENGTH + 4), bytes(4 * LENGTH - 4)]), r"'start_logits' .* in 260 bytes"),
        (
            reply(outputs=[{"name": name, "datatype": "FP32", "shape": [LENGTH]} for name in OUTPUT_NAMES]),
            r"'start_logits' is not FP32 \[1, 64\]: FP32 \[64\]",
        ),
        (
            reply(outputs=[{"name": name, "datatype": "INT32", "shape": [1, LENGTH]} for name in OUTPUT_NAMES]),
            r"'start_logits' is not FP32 \[1, 64\]: INT32 \[1, 64\]",
        ),
        (
            reply(outputs=[{"name": "start_logits", "datatype": "FP32", "shape": [1, LENGTH]}] * 2),
            "no output 'end_logits' among its 1",
        ),
    ],
)
def test_a_reply_that_is_not_whole_is_named(message: Any, problem: str) -> None:
    with pytest.raises(EngineBroken, match=problem):
        decode_logits(message.SerializeToString(), LENGTH)


@given(st.binary(max_size=100))
def test_other_bytes_are_no_reply(content: bytes) -> None:
    with pytest.raises(EngineBroken):
        decode_logits(content, LENGTH)
