"""How Triton runs the engines of each target; only the engine builder knows how to build them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

TargetName = Literal["cpu", "tensorrt"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedTarget:
    """What Triton's configuration, the doctor and the publisher need to know about a target."""

    backend: Literal["python", "tensorrt"]  # Triton backend
    processor: Literal["CPU", "GPU"]  # where Triton places the instances
    has_profiles: bool  # the engine has one profile per bucket; Triton's configuration must list them
    has_cuda_graphs: bool
    warms_every_batch_size: bool  # the runtime compiles for each batch size on first use


SERVED_TARGETS: Mapping[TargetName, ServedTarget] = {
    "cpu": ServedTarget(
        backend="python", processor="CPU", has_profiles=False, has_cuda_graphs=False, warms_every_batch_size=True
    ),
    "tensorrt": ServedTarget(
        backend="tensorrt", processor="GPU", has_profiles=True, has_cuda_graphs=True, warms_every_batch_size=False
    ),
}
