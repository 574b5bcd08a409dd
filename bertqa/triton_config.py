"""The ``config.pbtxt`` of a served model: one text for every target, so that clients see the same tensors."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from bertqa.manifest import Manifest
from bertqa.windows import INPUT_NAMES, OUTPUT_NAMES

MAX_QUEUE_SIZE = 256
"""Requests that wait at most; Triton refuses the next at once."""
QUEUE_TIMEOUT_MICROSECONDS = 5_000_000
"""How long a request may wait unless it says otherwise; about the time that a full queue of long windows takes."""

_BACKENDS = {"cpu": ("python", "KIND_CPU"), "tensorrt": ("tensorrt", "KIND_GPU")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """How a model is served: which of its versions, and by what."""

    active: int  # the version that answers
    previous: int | None = None  # the one that did before, for a rollback
    loaded: tuple[int, ...]  # versions that Triton holds ready, in rising order, the active one among them
    instances: int = 2  # engines of each version side by side
    threads: int = 0  # cores that each may use on a CPU; 0 is all of them
    gpus: tuple[int, ...] = ()  # devices with so many engines each; none stands for all that there are


def triton_config(model: str, manifests: Mapping[int, Manifest], serving: Serving) -> str:
    """Write the configuration of a model.

    Triton leaves a loaded version alone when nothing but ``version_policy`` and ``instance_group`` change, and builds
    it anew, beside the one that answers meanwhile, when anything else does. So every version on disk has its identity
    here, whether it is loaded or not: to unload one then changes the policy alone.

    Args:
        model: its name.
        manifests: of all versions in the repository.
        serving: which of them are loaded.

    Returns:
        The text of ``config.pbtxt``.

    Raises:
        ValueError: the loaded versions run on different targets, which one model cannot.
    """
    loaded = [manifests[version] for version in serving.loaded]
    targets = {manifest.target for manifest in loaded}
    if len(targets) != 1:
        raise ValueError(f"loaded: versions for {' and '.join(sorted(targets))} cannot be one model")
    backend, kind = _BACKENDS[targets.pop()]
    instances = serving.instances
    lengths = set.intersection(*(set(manifest.buckets) for manifest in loaded))  # those that every version can
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
# Written by bertqa from serving.json and the manifests; changes made by hand are lost.
name: "{model}"
backend: "{backend}"
max_batch_size: 1
input [
{inputs}
]
output [
{outputs}
]
version_policy {{ specific {{ versions: [ {", ".join(map(str, serving.loaded))} ] }} }}
instance_group [ {{ count: {instances} kind: {kind} }} ]
dynamic_batching {{
  max_queue_delay_microseconds: 0{policy}
}}
"""
    parameters = {"threads": str(serving.threads)}
    parameters |= {f"identity_{version}": manifest.identity for version, manifest in sorted(manifests.items())}
    return "".join([head, *(_parameter(*pair) for pair in parameters.items()), *map(_warmup, sorted(lengths))])


def _tensor(name: str, data_type: str) -> str:
    return f'  {{ name: "{name}" data_type: {data_type} dims: [ -1 ] }}'


def _parameter(key: str, value: str) -> str:
    return f'parameters {{ key: "{key}" value {{ string_value: {json.dumps(value, ensure_ascii=False)} }} }}\n'


def _warmup(length: int) -> str:
    """One request of zeros: token id 0 exists in every vocabulary, where random ids would not."""
    inputs = "\n".join(
        f'  inputs {{ key: "{name}" value {{ data_type: TYPE_INT32 dims: [ {length} ] zero_data: true }} }}'
        for name in INPUT_NAMES
    )
    return f'model_warmup {{\n  name: "length_{length}"\n  batch_size: 1\n{inputs}\n}}\n'
