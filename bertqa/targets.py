"""How Triton runs the engines of each target; how they are built is known to the builder alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

TargetName = Literal["cpu", "tensorrt"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedTarget:
    """What the configuration of a model, the doctor and the publisher need to know of a target."""

    backend: Literal["python", "tensorrt"]  # of Triton
    processor: Literal["CPU", "GPU"]  # that Triton places the instances on
    has_profiles: bool  # the engine holds a profile for each bucket, which Triton must be told by name
    has_cuda_graphs: bool
    warms_every_batch_size: bool  # it compiles for a number of windows when it first sees it


SERVED_TARGETS: Mapping[TargetName, ServedTarget] = {
    "cpu": ServedTarget(
        backend="python", processor="CPU", has_profiles=False, has_cuda_graphs=False, warms_every_batch_size=True
    ),
    "tensorrt": ServedTarget(
        backend="tensorrt", processor="GPU", has_profiles=True, has_cuda_graphs=True, warms_every_batch_size=False
    ),
}
