"""Test that a registered target is built, published, configured and examined without other changes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import pytest

from bertqa import targets as served_targets
from bertqa.repository import Repository
from bertqa.targets import SERVED_TARGETS, TargetName
from engine_builder import targets
from engine_builder.build import BuildOptions, build
from engine_builder.engine import EngineOptions
from engine_builder.publish import BuildRefused
from engine_builder.targets.openvino import OpenVINO
from service.commands.doctor.cpu import check_cpu
from service.commands.doctor.gpu import check_gpus
from service.commands.doctor.shared_memory import check_shared_memory
from tests.support.checkpoints import write_checkpoint
from tests.support.squad_files import write_squad


def test_every_target_is_in_both_registries() -> None:
    assert {*targets.TARGETS} == {*SERVED_TARGETS} == {*get_args(TargetName)}
    for target in targets.TARGETS.values():
        assert target.default_precision() in target.precisions
        assert target.uncalibrated in {*target.precisions} - target.calibrated
        assert target.calibrated <= {*target.precisions}


@dataclass(frozen=True)
class Elsewhere(OpenVINO):
    """A target of a test: OpenVINO's engine, said to run on a GPU under another backend."""

    missing: tuple[tuple[str, str], ...] = ()
    precisions = ("fp32",)
    own_options = frozenset({"gpus"})

    def default_precision(self) -> str:
        return "fp32"

    def diagnose(self) -> Mapping[str, str]:
        return dict(self.missing)

    def check_machine(self, precision: str, options: EngineOptions) -> str:
        if options.gpus and max(options.gpus) > 1:
            raise BuildRefused("--gpus: there are two")
        return precision


def test_a_new_target_is_one_class_and_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = write_checkpoint(tmp_path / "tiny")
    write_squad(checkpoint / "gate.json")
    row = replace(SERVED_TARGETS["tensorrt"], has_cuda_graphs=False)
    monkeypatch.setitem(targets.TARGETS, "tensorrt", Elsewhere())
    monkeypatch.setitem(served_targets.SERVED_TARGETS, "tensorrt", row)
    options = BuildOptions(checkpoint=str(checkpoint), target="tensorrt", repository=tmp_path / "repository")
    with pytest.raises(BuildRefused, match="--precision int8: --target tensorrt supports fp32"):
        build(replace(options, precision="int8"))
    with pytest.raises(BuildRefused, match="--gpus: there are two"):
        build(replace(options, gpus=(2,)))
    with pytest.raises(BuildRefused, match="--gpus: only valid with --target tensorrt"):
        build(replace(options, target="cpu", gpus=(1,)))
    manifest = build(replace(options, gpus=(1,)))
    assert (manifest.target, manifest.precision) == ("tensorrt", "fp32")

    repository = Repository(options.repository)
    config = repository.written_config("bert_qa")
    (group,) = config.instance_group
    assert (config.backend, list(group.gpus), list(group.profile)) == ("tensorrt", [1], ["0", "1"])
    assert not config.HasField("optimization")
    bundle, serving = repository.open(), repository.serving()
    (cpu,) = check_cpu({"bert_qa 1": manifest}, (), is_here=True)
    assert cpu.text == "not used by any engine"
    assert check_shared_memory(serving, [bundle]).text == "not needed"
    (gpu,) = check_gpus({"bert_qa 1": manifest}, serving, is_here=False)
    assert gpu.text.startswith("not checked")
