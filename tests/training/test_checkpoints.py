"""Test resume states on disk: reads return what was written or name the damaged file; a full disk damages nothing."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.support.paths import ROOT
from training.checkpoints import (
    PREVIOUS_STATE_FILE,
    STATE_FILE,
    CheckpointError,
    State,
    collect,
    load_state,
    restore,
    save_state,
    save_tensors,
)
from training.lamb import make_optimizer

RUN = {"learning_rate": 0.1, "sizes": (2, 3)}


def trained(name: str = "adamw", seed: int = 0) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model and an optimizer with moments."""
    torch.manual_seed(seed)
    model = torch.nn.Linear(3, 2)
    optimizer = make_optimizer(name, model, 0.1, 0.01)  # type: ignore[arg-type]
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def state(step: int, seed: int = 0) -> State:
    return State(step, collect(*trained(seed=seed)), {})


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_a_state_is_restored_as_it_was_saved(tmp_path: Path, name: str) -> None:
    model, optimizer = trained(name)
    save_state(tmp_path, State(7, collect(model, optimizer), {"scale": 4.0}), RUN)
    found = load_state(tmp_path, RUN)
    assert found is not None
    assert (found.step, found.scaler) == (7, {"scale": 4.0})
    other_model, other = trained(name, seed=1)
    restore(other_model, other, found.tensors)
    expected, restored = collect(model, optimizer), collect(other_model, other)
    assert expected.keys() == restored.keys()
    assert {key.partition("/")[0] for key in expected} >= {"model", "exp_avg", "exp_avg_sq", "step"}
    assert all(torch.equal(expected[key], restored[key]) for key in expected)


@given(
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]),
    shape=st.lists(st.integers(0, 3), max_size=3),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_tensors_of_any_kind_are_kept(tmp_path: Path, dtype: torch.dtype, shape: list[int]) -> None:
    tensor = (torch.rand(shape) * 9 - 4).to(dtype)
    save_state(tmp_path, State(1, {"model/weight": tensor}, {}), RUN)
    found = load_state(tmp_path, RUN)
    assert found is not None
    assert found.tensors["model/weight"].dtype == dtype
    assert torch.equal(found.tensors["model/weight"], tensor)


def test_a_run_without_a_state_starts_afresh(tmp_path: Path) -> None:
    assert load_state(tmp_path, RUN) is None


def test_two_generations_are_kept_and_the_newest_is_read(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_state(tmp_path, state(step), RUN)
    assert sorted(path.name for path in tmp_path.iterdir()) == [PREVIOUS_STATE_FILE, STATE_FILE]
    found = load_state(tmp_path, RUN)
    assert found is not None
    assert found.step == 3
    (tmp_path / STATE_FILE).unlink()  # as a run leaves it that is killed between two renames
    found = load_state(tmp_path, RUN)
    assert found is not None
    assert found.step == 2


@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)
def test_a_flipped_bit_is_refused_wherever_it_is(tmp_path: Path, where: float, bit: int) -> None:
    path = tmp_path / STATE_FILE
    save_state(tmp_path, state(5), RUN)
    (tmp_path / PREVIOUS_STATE_FILE).unlink(missing_ok=True)
    whole = bytearray(path.read_bytes())
    whole[int(where * len(whole))] ^= 1 << bit
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match=STATE_FILE.replace(".", r"\.")):
        load_state(tmp_path, RUN)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    save_file({"weight": torch.zeros(7, 7)}, path)


@pytest.mark.parametrize("spoil", [cut, empty, foreign])
def test_a_truncated_or_foreign_file_is_named_with_what_to_do(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    save_state(tmp_path, state(5), RUN)
    spoil(tmp_path / STATE_FILE)
    with pytest.raises(
        CheckpointError, match=r"/resume\.safetensors: corrupt or truncated .*; delete it to start afre"
    ):
        load_state(tmp_path, RUN)
    (tmp_path / STATE_FILE).unlink()
    for step in (5, 6):
        save_state(tmp_path, state(step), RUN)
    spoil(tmp_path / STATE_FILE)
    with pytest.raises(CheckpointError, match=r"; delete it to resume from step 5 of resume\.previous\.safetensors"):
        load_state(tmp_path, RUN)
    (tmp_path / STATE_FILE).unlink()
    found = load_state(tmp_path, RUN)
    assert found is not None
    assert found.step == 5
    save_state(tmp_path, state(6), RUN)
    save_state(tmp_path, state(7), RUN)
    spoil(tmp_path / STATE_FILE)
    spoil(tmp_path / PREVIOUS_STATE_FILE)
    with pytest.raises(CheckpointError, match=r"resume\.previous\.safetensors cannot be used either; delete both"):
        load_state(tmp_path, RUN)


def test_a_state_of_another_run_is_refused_with_the_difference(tmp_path: Path) -> None:
    save_state(tmp_path, state(5), RUN)
    with pytest.raises(CheckpointError, match=r"other settings \(learning_rate 0\.1, now 0\.2, seed None, now 3\)"):
        load_state(tmp_path, RUN | {"learning_rate": 0.2, "seed": 3})


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model/weight": torch.zeros(2, 3)}, "has no parameter 'bias'"),
        ({"model/weight": torch.zeros(3, 3), "model/bias": torch.zeros(2)}, r"'weight' is \(3, 3\), in this model \(2"),
        ({"model/weight": torch.zeros(2, 3), "model/bias": torch.zeros(2), "step/x": torch.zeros(1)}, "has 'step/x'"),
    ],
)
def test_tensors_of_another_model_are_refused(tensors: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        restore(*trained(), tensors)


FILL = """
import resource, signal, sys
from pathlib import Path
import torch
from training.checkpoints import CheckpointError, State, save_state
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write beyond the limit fails as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    save_state(Path(sys.argv[1]), State(9, {"model/weight": torch.ones(100_000)}, {}), {})
except CheckpointError as error:
    print(error)
"""


def test_a_full_disk_leaves_the_earlier_states_in_place(tmp_path: Path) -> None:
    for step in (1, 2):
        save_state(tmp_path, state(step), RUN)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    command = [sys.executable, "-c", FILL, str(tmp_path), "100000"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert f"{tmp_path / STATE_FILE}: cannot be written" in done.stdout
    assert "earlier checkpoints are unchanged" in done.stdout
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/model\.safetensors: cannot be written"):
        save_tensors(tmp_path / "file" / "model.safetensors", {"weight": torch.ones(2)}, {})


def test_the_file_is_plain_safetensors(tmp_path: Path) -> None:
    save_state(tmp_path, state(5), RUN)
    assert load_file(tmp_path / STATE_FILE)["model/weight"].shape == (2, 3)
    with safe_open(tmp_path / STATE_FILE, framework="pt") as file:
        assert json.loads(file.metadata()["record"])["step"] == 5
