"""Test the comparison of length buckets: one row per list, and every window padded by its list."""

from pathlib import Path

import pytest

from bertqa.cli.command import parse
from engine_builder.benchmarks import compare_buckets
from engine_builder.benchmarks.commands import BucketsOptions
from engine_builder.build import BuildOptions, build
from engine_builder.publish import BuildRefused
from tests.support.checkpoints import write_checkpoint
from tests.support.squad_files import write_squad


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    checkpoint = write_checkpoint(tmp_path / "tiny")
    data = write_squad(checkpoint / "gate.json")
    options = BuildOptions(
        checkpoint=str(checkpoint), target="cpu", precision="fp32", repository=tmp_path / "repository", threads=1
    )
    build(options)
    return ["--repository", str(options.repository), "--data", str(data), "--threads", "1", "--rounds", "1"]


def test_a_list_is_a_row(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    compare_buckets.main(parse(BucketsOptions, [*arguments, "--buckets", "64,128", "--buckets", "128"]))
    first, _, heading, _, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("tiny-cpu-fp32-")
    columns = [cell.strip() for cell in heading.strip("|").split("|")]
    few, one = (
        dict(zip(columns, (cell.strip() for cell in line.strip("|").split("|")), strict=True)) for line in lines
    )
    assert (few["buckets"], one["buckets"]) == ("64, 128", "128")
    assert (few["tokens with padding"], one["tokens with padding"]) == ("64", "128"), "the texts are short"
    assert few["of the first"] == "1.00"
    for row in (few, one):
        assert 0 < float(row["p50 ms"]) <= float(row["p99 ms"])
        assert float(row["memory MiB"]) > 0


def test_a_list_without_room_for_the_longest_window_is_refused(arguments: list[str]) -> None:
    with pytest.raises(BuildRefused, match="--buckets: a window may have 128 tokens, and 64 is less"):
        compare_buckets.main(parse(BucketsOptions, [*arguments, "--buckets", "64"]))
