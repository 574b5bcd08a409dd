"""The targets that an engine can be built for.

To add a target, add a file here with a class that implements `Target`, a line in `TARGETS`, and a row in
`bertqa.targets.SERVED_TARGETS`, which says how Triton runs its engines.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from bertqa.targets import TargetName
from engine_builder.engine import Engine, EngineOptions, Source
from engine_builder.targets.openvino import OpenVINO
from engine_builder.targets.tensorrt import TensorRT


class Target(Protocol):
    """A runtime and its kind of processor."""

    @property
    def precisions(self) -> Sequence[str]:
        """Precisions that an engine can be built at."""

    @property
    def calibrated(self) -> frozenset[str]:
        """Precisions that are calibrated on real windows."""

    @property
    def uncalibrated(self) -> str:
        """Precision to fall back to without calibration data."""

    @property
    def own_options(self) -> frozenset[str]:
        """Fields of `EngineOptions` that only this target uses."""

    def default_precision(self) -> str:
        """Return the default precision on this machine."""

    def diagnose(self) -> Mapping[str, str]:
        """Return what this machine lacks to build an engine, and how to get it; empty if nothing is missing."""

    def check_machine(self, precision: str, options: EngineOptions) -> str:
        """Refuse a build that would fail on this machine, and log which precision would be faster.

        Returns:
            The precision to build at: the requested one, or another if this machine does not support it.

        Raises:
            BuildRefused: the machine lacks something or does not support an option; the message says what would work.
        """

    def build(
        self, source: Source, directory: Path, precision: str, options: EngineOptions, stack: ExitStack
    ) -> Engine:
        """Build an engine, and load it as Triton will.

        Args:
            source: what to build; a precision in ``calibrated`` needs calibration windows.
            directory: directory of the model version, for the engine's files; other files may be written next to it.
            precision: the precision that `check_machine` returned.
            options: options of the build.
            stack: closing it releases what the engine uses.

        Raises:
            BuildRefused: the runtime cannot build the engine; the message has its reason.
        """


TARGETS: Mapping[TargetName, Target] = {"cpu": OpenVINO(), "tensorrt": TensorRT()}
