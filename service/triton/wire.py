"""Encode windows as requests of Triton's inference protocol, and decode replies into logits.

These pure functions are on the hot path. Requests are encoded by hand, because most of their bytes are the same for
every window of a length, and building a protobuf message costs more than the rest of the call. Field numbers are from
https://github.com/triton-inference-server/common/blob/main/protobuf/grpc_service.proto; a test compares the bytes with
protobuf's encoding of the same message.
"""

from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2

from bertqa.spans import FloatArray, Logits, are_real
from bertqa.windows import INPUT_NAMES, OUTPUT_NAMES, Window
from service.triton.errors import EngineBroken

NOT_A_MESSAGE = "The engine's reply is not a message of Triton's protocol."

_ID, _RAW_INPUT_CONTENTS = 3, 7  # fields of ModelInferRequest
# Field 4, parameters: a map entry {"timeout": {int64_param: …}}. Its three lengths are always below 128.
_TIMEOUT = b"\x22%c\x0a\x07timeout\x12%c\x10%b"


class RequestEncoder:
    """Encodes the requests for one version of a model."""

    def __init__(self, model: str, version: str) -> None:
        """Set model and version; with an empty version, Triton uses the highest that it has loaded."""
        self._model = model
        self._version = version
        self._constant: dict[int, tuple[bytes, bytes]] = {}  # by window length

    def encode(self, window: Window, *, request_id: str, timeout_s: float) -> bytes:
        """Encode one window as a ``ModelInferRequest``.

        Args:
            window: each of its tensors is int32 of shape (1, length).
            request_id: appears in Triton's log and traces; may be empty.
            timeout_s: seconds after which Triton drops the request from its queue, if the model's queue policy has
                ``allow_timeout_override``.
        """
        length = window.input_ids.shape[1]
        constant = self._constant.get(length)
        if constant is None:
            constant = self._constant[length] = self._head(length), _prefix(_RAW_INPUT_CONTENTS, 4 * length)
        head, raw = constant
        timeout = _varint(max(int(timeout_s * 1e6), 1))
        identifier = request_id.encode()
        return b"".join(
            (
                head,
                _prefix(_ID, len(identifier)),
                identifier,
                _TIMEOUT % (len(timeout) + 12, len(timeout) + 1, timeout),
                raw,
                window.input_ids.tobytes(),
                raw,
                window.attention_mask.tobytes(),
                raw,
                window.token_type_ids.tobytes(),
            )
        )

    def _head(self, length: int) -> bytes:
        """Encode the part that is the same for every window of a length; protobuf messages may be concatenated."""
        return bytes(
            service_pb2.ModelInferRequest(
                model_name=self._model,
                model_version=self._version,
                inputs=[{"name": name, "datatype": "INT32", "shape": [1, length]} for name in INPUT_NAMES],
                outputs=[{"name": name} for name in OUTPUT_NAMES],
            ).SerializeToString()
        )


def decode_logits(reply: bytes, length: int) -> Logits:
    """Decode a ``ModelInferResponse``.

    Args:
        reply: its bytes.
        length: window length, in tokens.

    Returns:
        Start and end logits, each read-only float32 of shape (1, length).

    Raises:
        EngineBroken: the reply is not such a message, a tensor is missing or has the wrong type or shape, or a number
            is NaN, infinite or absurdly large.
    """
    try:
        message = service_pb2.ModelInferResponse.FromString(reply)
    except DecodeError:
        raise EngineBroken(NOT_A_MESSAGE) from None
    outputs, raw = list(message.outputs), list(message.raw_output_contents)
    if tuple([output.name for output in outputs]) == OUTPUT_NAMES and len(raw) == 2:
        start, end = outputs
        shape = [1, length]
        if (
            start.datatype == end.datatype == "FP32"
            and start.shape == shape
            and end.shape == shape
            and len(raw[0]) == len(raw[1]) == 4 * length
        ):
            both = np.frombuffer(b"".join(raw), np.float32).reshape(2, 1, length)
            if are_real(both):
                return both[0], both[1]
    return _decode_any_order(outputs, raw, length)


def _decode_any_order(outputs: list[Any], raw: list[bytes], length: int) -> Logits:
    """Decode outputs in any order; the error names the first invalid one."""
    if len(outputs) != len(raw):
        raise EngineBroken("The engine's reply has no raw tensors.")
    found = {output.name: (output, content) for output, content in zip(outputs, raw, strict=True)}
    start, end = (_tensor(found, name, length) for name in OUTPUT_NAMES)
    return start, end


def _tensor(found: dict[str, tuple[Any, bytes]], name: str, length: int) -> FloatArray:
    if name not in found:
        raise EngineBroken(
            f"The engine's reply has no output {name!r} among its {len(found)} outputs", detail=str(sorted(found))
        )
    output, raw = found[name]
    shape = list(output.shape)
    if output.datatype != "FP32" or shape != [1, length] or len(raw) != 4 * length:
        raise EngineBroken(
            f"The engine's output {name!r} is not FP32 [1, {length}]",
            detail=f"{output.datatype} {shape} in {len(raw)} bytes",
        )
    values = np.frombuffer(raw, np.float32).reshape(1, length)
    if not are_real(values):
        raise EngineBroken(f"The engine's output {name!r} holds NaN, infinite or absurdly large numbers.")
    return values


def _prefix(field: int, length: int) -> bytes:
    """Encode the key of a string, bytes or message field with a number below 16, and the length of its content."""
    return b"%c%b" % (field << 3 | 2, _varint(length))


def _varint(number: int) -> bytes:
    """Encode a non-negative integer: seven bits per byte, lowest first."""
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
