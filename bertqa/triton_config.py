"""The ``config.pbtxt`` of a served model: one text for every target, so that clients see the same tensors."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from bertqa.manifest import Manifest, Target
from bertqa.windows import INPUT_NAMES, OUTPUT_NAMES

MAX_QUEUE_SIZE = 256
"""Requests that wait at most; Triton refuses the next at once."""
QUEUE_TIMEOUT_MICROSECONDS = 5_000_000
"""How long a request may wait unless it says otherwise; about the time that a full queue of long windows takes."""

# Without graph_spec Triton captures every profile's best length, which is a bucket, at batch size 1 and the largest. A
# graph_spec it would try with all profiles, and log an error for each whose range it is outside (instance_state.cc).
_CUDA_GRAPHS = "optimization { cuda { graphs: true } }\n"

_BACKENDS: dict[Target, str] = {"cpu": "python", "tensorrt": "tensorrt"}


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
        ValueError: the loaded versions run on different targets, or on a GPU with different buckets, which one model
            cannot.
    """
    loaded = [manifests[version] for version in serving.loaded]
    targets = {manifest.target for manifest in loaded}
    if len(targets) != 1:
        raise ValueError(f"loaded: versions for {' and '.join(sorted(targets))} cannot be one model")
    (target,) = targets
    buckets = {manifest.buckets for manifest in loaded}
    if target == "tensorrt" and len(buckets) != 1:  # the profiles are named once for all versions
        raise ValueError(
            f"loaded: versions with the buckets {' and '.join(map(str, sorted(buckets)))} cannot be one model"
        )
    lengths = sorted(set.intersection(*map(set, buckets)))  # those that every version can
    max_batch_size = min(manifest.max_batch_size for manifest in loaded)
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
    if serving.instances * max(1, len(serving.gpus)) == 1:
        # With a queue policy and a single instance, Triton 2.51 leaves about one request in a hundred waiting for half
        # a second or more while the instance is idle; never seen without the policy, or with a second instance.
        policy = ""
    head = f"""\
# Written by bertqa from serving.json and the manifests; changes made by hand are lost.
name: "{model}"
backend: "{_BACKENDS[target]}"
max_batch_size: {max_batch_size}
input [
{inputs}
]
output [
{outputs}
]
version_policy {{ specific {{ versions: [ {", ".join(map(str, serving.loaded))} ] }} }}
instance_group [ {{ {_group(target, serving, len(lengths))} }} ]
dynamic_batching {{
  max_queue_delay_microseconds: 0{policy}
}}
"""
    parameters = {"threads": str(serving.threads)}
    parameters |= {f"identity_{version}": manifest.identity for version, manifest in sorted(manifests.items())}
    graphs = _CUDA_GRAPHS if target == "tensorrt" else ""
    # A CPU engine compiles for a number of windows when it first sees it.
    batches = sorted({1, max_batch_size}) if target == "cpu" else [1]
    warmups = [_warmup(length, windows) for length in lengths for windows in batches]
    return "".join([head, graphs, *(_parameter(*pair) for pair in parameters.items()), *warmups])


def _group(target: Target, serving: Serving, profiles: int) -> str:
    """What an instance group holds. TensorRT's profiles must be named: unnamed, Triton would use the first alone."""
    if target == "cpu":
        return f"count: {serving.instances} kind: KIND_CPU"
    gpus = f" gpus: [ {', '.join(map(str, serving.gpus))} ]" if serving.gpus else ""
    names = ", ".join(f'"{n}"' for n in range(profiles))
    return f"count: {serving.instances} kind: KIND_GPU{gpus} profile: [ {names} ]"


def _tensor(name: str, data_type: str) -> str:
    return f'  {{ name: "{name}" data_type: {data_type} dims: [ -1 ] }}'


def _parameter(key: str, value: str) -> str:
    return f'parameters {{ key: "{key}" value {{ string_value: {json.dumps(value, ensure_ascii=False)} }} }}\n'


def _warmup(length: int, windows: int) -> str:
    """A request of zeros: token id 0 exists in every vocabulary, where random ids would not."""
    inputs = "\n".join(
        f'  inputs {{ key: "{name}" value {{ data_type: TYPE_INT32 dims: [ {length} ] zero_data: true }} }}'
        for name in INPUT_NAMES
    )
    name = f"length_{length}" + (f"_windows_{windows}" if windows > 1 else "")
    return f'model_warmup {{\n  name: "{name}"\n  batch_size: {windows}\n{inputs}\n}}\n'
