"""What an engine can be built for.

A target is one file here with a class that follows `Target`, one line in `TARGETS`, and one row in
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
        """Those that an engine can be built at."""

    @property
    def calibrated(self) -> frozenset[str]:
        """Those of the precisions whose ranges are measured on real windows."""

    @property
    def uncalibrated(self) -> str:
        """The precision to fall back to where there is no calibration data."""

    @property
    def own_options(self) -> frozenset[str]:
        """Fields of `EngineOptions` that mean nothing to the other targets."""

    def default_precision(self) -> str:
        """The precision to build on this machine where none is asked for."""

    def diagnose(self) -> Mapping[str, str]:
        """What this machine lacks to build an engine, and how to get it; empty where nothing is missing."""

    def check_machine(self, precision: str, options: EngineOptions) -> str:
        """Refuse to begin what cannot end, and say what would be faster.

        Returns:
            The precision to build at: the one asked for, or another where this machine has to do without.

        Raises:
            BuildRefused: the machine lacks something, or an option cannot be met; the message says what would work.
        """

    def build(
        self, source: Source, directory: Path, precision: str, options: EngineOptions, stack: ExitStack
    ) -> Engine:
        """Build an engine, and load it as Triton will.

        Args:
            source: what to build; a precision in ``calibrated`` needs its calibration windows.
            directory: of the model version; gets the engine's files. Others may be written beside it.
            precision: as `check_machine` returned it.
            options: of the build.
            stack: ends the engine's use of the machine.

        Raises:
            BuildRefused: the runtime could not; the message has its reason.
        """


TARGETS: Mapping[TargetName, Target] = {"cpu": OpenVINO(), "tensorrt": TensorRT()}
