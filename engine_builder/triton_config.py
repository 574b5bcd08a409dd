"""The ``config.pbtxt`` of the served model: one text for every target, so that clients see the same tensors."""

import json

from bertqa.manifest import MODEL_NAME, Manifest
from bertqa.windows import INPUT_NAMES, OUTPUT_NAMES

MAX_QUEUE_SIZE = 256
"""Requests that wait at most; Triton refuses the next at once."""
QUEUE_TIMEOUT_MICROSECONDS = 5_000_000
"""How long a request may wait unless it says otherwise; about the time that a full queue of long windows takes."""

_BACKENDS = {"cpu": ("python", "KIND_CPU"), "tensorrt": ("tensorrt", "KIND_GPU")}


def triton_config(manifest: Manifest, *, instances: int, threads: int) -> str:
    """Write the configuration of a published engine.

    Args:
        manifest: of the version that Triton will load; only the latest one is served.
        instances: engines working side by side.
        threads: cores that each may use; 0 is all of them.

    Returns:
        The text of ``config.pbtxt``.
    """
    backend, kind = _BACKENDS[manifest.target]
    inputs = ",\n".join(_tensor(name, "TYPE_INT32") for name in INPUT_NAMES)
    outputs = ",\n".join(_tensor(name, "TYPE_FP32") for name in OUTPUT_NAMES)
    # Without an explicit batcher Triton ignores queue limits and timeouts; without an explicit group it chooses the
    # device by itself. A queued request is refused once late, but one being computed always finishes.
    policy = f"""
  default_queue_policy {{
    timeout_action: REJECT
    default_timeout_microseconds: {QUEUE_TIMEOUT_MICROSECONDS}
    allow_timeout_override: true
    max_queue_size: {MAX_QUEUE_SIZE}
  }}"""
    if instances == 1:
        # With a queue policy and a single instance, Triton 2.51 leaves about one request in a hundred waiting for half
        # a second or more while the instance is idle; never seen without the policy, or with a second instance.
        policy = ""
    head = f"""\
# Written by engine_builder; built again with every version.
name: "{MODEL_NAME}"
backend: "{backend}"
max_batch_size: 1
input [
{inputs}
]
output [
{outputs}
]
version_policy {{ latest {{ num_versions: 1 }} }}
instance_group [ {{ count: {instances} kind: {kind} }} ]
dynamic_batching {{
  max_queue_delay_microseconds: 0{policy}
}}
parameters {{ key: "identity" value {{ string_value: {json.dumps(manifest.identity, ensure_ascii=False)} }} }}
parameters {{ key: "threads" value {{ string_value: "{threads}" }} }}
"""
    return head + "".join(_warmup(length) for length in manifest.buckets)


def _tensor(name: str, data_type: str) -> str:
    return f'  {{ name: "{name}" data_type: {data_type} dims: [ -1 ] }}'


def _warmup(length: int) -> str:
    """One request of zeros: token id 0 exists in every vocabulary, where random ids would not."""
    inputs = "\n".join(
        f'  inputs {{ key: "{name}" value {{ data_type: TYPE_INT32 dims: [ {length} ] zero_data: true }} }}'
        for name in INPUT_NAMES
    )
    return f'model_warmup {{\n  name: "length_{length}"\n  batch_size: 1\n{inputs}\n}}\n'
