"""``bertqa doctor``: look for what would go wrong, before it does, and say how to fix it.

Each module here looks at one thing and yields `Finding`s; `diagnose` runs them in the order in which one needs another.
Nothing is changed, and the doctor may run beside a service that answers.
"""

from dataclasses import dataclass, field
from pathlib import Path

from service.runtime.ports import LOOPBACK, TritonPorts
from service.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorOptions:
    """What to look at."""

    repository: Path
    triton_url: str | None = None  # of a running Triton, or several with commas; None: one that we would start
    host: str = LOOPBACK  # that the service would listen on
    port: int = 8000
    triton_grpc_port: int = TritonPorts.grpc  # of a Triton that we would start
    settings: Settings = field(default_factory=Settings)
