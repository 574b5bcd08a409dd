"""Test a run's records, its plot, and the peak speed of the device."""

import json
import math
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from training.metrics import METRICS_FILE, Metrics, peak_flops, plot_loss, plot_runs, read_metrics


def write(directory: Path, first: int, last: int) -> None:
    with Metrics(directory, first, 9) as metrics:
        for step in range(first + 1, last + 1):
            metrics.advance()
            metrics.write(step, {"loss": 1 / step, "mlm_loss": 0.5 / step, "mfu": 0.123456789})


def test_a_resumed_run_takes_out_the_records_of_the_steps_it_repeats(tmp_path: Path) -> None:
    write(tmp_path, 0, 6)
    assert read_metrics(tmp_path / METRICS_FILE)[0] == {"step": 1, "loss": 1.0, "mlm_loss": 0.5, "mfu": 0.123457}
    write(tmp_path, 4, 9)
    records = read_metrics(tmp_path / METRICS_FILE)
    assert [record["step"] for record in records] == list(range(1, 10))


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, 0, 3)
    path = tmp_path / METRICS_FILE
    path.write_text(path.read_text()[:-20])
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    write(tmp_path, 2, 4)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4]


def test_records_are_json_even_where_a_number_is_none(tmp_path: Path) -> None:
    with Metrics(tmp_path, 0, 9) as metrics:
        metrics.write(1, {"loss": 2.0, "gradient_norm": math.inf, "mfu": math.nan})
    text = (tmp_path / METRICS_FILE).read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "loss": 2.0, "gradient_norm": None, "mfu": None}


def test_the_loss_is_drawn_as_png(tmp_path: Path) -> None:
    plot_loss(tmp_path)
    assert not (tmp_path / "loss.png").exists()  # of a run without a record there is none
    write(tmp_path, 0, 5)
    plot_loss(tmp_path)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("terms", "drawn"), [([], ["loss"]), (["mlm"], ["loss"]), (["mlm", "nsp"], ["loss", "mlm_loss", "nsp_loss"])]
)
def test_a_single_term_is_the_loss_and_not_drawn_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terms: list[str], drawn: list[str]
) -> None:
    figures: list[Figure] = []
    save = Figure.savefig

    def savefig(figure: Figure, path: Path, *, dpi: int) -> None:
        figures.append(figure)
        save(figure, path, dpi=dpi)

    monkeypatch.setattr(Figure, "savefig", savefig)
    with Metrics(tmp_path, 0, 9) as metrics:
        metrics.write(1, {"loss": 2.0, "mlm_accuracy": 0.5} | {f"{term}_loss": 1.0 for term in terms})
    plot_loss(tmp_path)
    [figure] = figures
    assert [line.get_label() for line in figure.axes[0].lines] == drawn


def test_runs_are_drawn_on_the_same_axes_unless_one_has_no_such_number(tmp_path: Path) -> None:
    write(tmp_path / "one", 0, 5)
    write(tmp_path / "other", 0, 9)
    runs = [tmp_path / "one", tmp_path / "other"]
    plot_runs(tmp_path / "both.png", runs, "mlm_loss")
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match=r"one/metrics\.jsonl: has no nsp_loss"):
        plot_runs(tmp_path / "none.png", runs, "nsp_loss")
    assert not (tmp_path / "none.png").exists()


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    with Metrics(tmp_path, 0, 9, tensorboard=True) as metrics:
        metrics.write(3, {"loss": 2.5})
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 2.5)]


def test_the_peak_of_a_cpu_is_measured() -> None:
    cpu = torch.device("cpu")
    assert peak_flops(cpu, "bf16") >= peak_flops(cpu, "fp32") > 1e8


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
    ],
)
def test_the_peak_of_a_known_gpu_is_the_published_one(name: str, flops: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak_flops.cache_clear()
    assert peak_flops(torch.device("cuda", 0), "bf16") == flops
    peak_flops.cache_clear()
