"""Test the comparison of runtimes: a table row for every available engine, and a line for each missing one."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from bertqa.cli.command import parse
from engine_builder.benchmarks import compare_runtimes
from engine_builder.benchmarks.commands import RuntimesOptions
from engine_builder.checkpoint import InvalidCheckpoint
from engine_builder.targets.tensorrt import TensorRT, missing_parts
from tests.support.checkpoints import write_checkpoint
from tests.support.squad_files import write_squad


def test_every_runtime_has_its_line_and_its_bars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = write_checkpoint(tmp_path / "tiny")
    data = write_squad(checkpoint / "calibration.json")
    chart = tmp_path / "chart.png"
    arguments = ["--checkpoint", str(checkpoint), "--data", str(data), "--questions", "2", "--rounds", "1"]
    compare_runtimes.main(parse(RuntimesOptions, [*arguments, "--lengths", "64", "--chart", str(chart)]))
    heading, _, *lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert heading == "| runtime | 64 tokens | F1 |"
    rows = {cells[1]: cells[2:4] for cells in ([cell.strip() for cell in line.split("|")] for line in lines)}
    assert rows["ONNX Runtime fp32"][0].endswith(" ms (1.0×)")
    for name in ("PyTorch fp32, CPU", "ONNX Runtime fp32, fused", "OpenVINO fp32", "OpenVINO int8"):
        assert rows[name][0].endswith("×)"), name
        assert float(rows[name][1]) >= 0
    missing = missing_parts()
    for name in ("TensorRT",) if missing else ("TensorRT fp16", "TensorRT int8"):
        assert rows[name][0].startswith("not measured: needs ") == bool(missing)
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_a_length_that_is_no_bucket_is_refused(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "tiny")
    data = write_squad(checkpoint / "calibration.json")
    args = parse(RuntimesOptions, ["--checkpoint", str(checkpoint), "--data", str(data), "--lengths", "100"])
    with pytest.raises(InvalidCheckpoint, match="--lengths 100: the model's buckets are 64, 128"):
        compare_runtimes.main(args)


def test_without_calibration_data_the_others_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_checkpoint(tmp_path / "tiny")
    data = write_squad(tmp_path / "squad.json")
    monkeypatch.setattr(TensorRT, "diagnose", lambda _: {})
    monkeypatch.setattr(TensorRT, "check_machine", lambda *_: None)
    engine = SimpleNamespace(predict=None, latency=lambda _: {"p50": 2.0, "graph_p50": 0.5})
    monkeypatch.setattr(TensorRT, "build", lambda *_: engine)
    args = ["--checkpoint", str(checkpoint), "--data", str(data), "--questions", "0", "--rounds", "1"]
    compare_runtimes.main(parse(RuntimesOptions, [*args, "--lengths", "64"]))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    rows = {cells[1].strip(): cells[2].strip() for cells in (line.split("|") for line in lines)}
    assert [name for name, cell in rows.items() if cell == "not measured: needs --calibration-data"] == [
        *("ONNX Runtime int8, static", "OpenVINO int8", "TensorRT int8", "TensorRT fp8"),
    ]
    assert rows["TensorRT fp16"].startswith("0.50 ms")  # by the CUDA graph, as Triton runs it
