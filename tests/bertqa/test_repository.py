"""Test changes to the model repository: Triton and the service can read it at any moment."""

import contextlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2

from bertqa.manifest import MODEL_NAME, Bundle, BundleMismatch
from bertqa.repository import ChangeRefused, Repository
from bertqa.triton_config import Serving
from tests.support.repositories import publish_toy_bundle

Add = Callable[..., None]


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "model_repository")


@pytest.fixture
def add(bundle: Bundle, repository: Repository) -> Add:
    """Puts a version of the toy model, without an engine, into the repository; fields are those of its manifest."""

    def add(version: int, model: str = MODEL_NAME, **fields: Any) -> None:
        publish_toy_bundle(repository, bundle, version, model, **{"name": f"toy{version}", **fields})

    return add


def config(repository: Repository, model: str = MODEL_NAME) -> "model_config_pb2.ModelConfig":
    return text_format.Parse((repository.root / model / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def test_an_empty_repository_names_the_builder(repository: Repository) -> None:
    for model in (MODEL_NAME, "korean"):
        with pytest.raises(BundleMismatch, match=f"{model}: holds no built version; run .python -m engine_builder"):
            repository.open(model)
    assert repository.serving() == {}


def test_who_only_reads_needs_no_triton_client(repository: Repository, add: Add) -> None:
    add(1)
    code = (
        "import sys; sys.modules.update(tritonclient=None, google=None, grpc=None); from pathlib import Path; "
        "from bertqa.repository import Repository; print(Repository(Path(sys.argv[1])).open().version)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(repository.root)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


def test_without_serving_json_the_highest_version_answers(repository: Repository, add: Add) -> None:
    add(9)
    add(10)
    add(3, "korean")
    (repository.root / MODEL_NAME / "11").mkdir()  # without a manifest: no version
    (repository.root / "lost+found").mkdir()
    assert repository.serving() == {
        MODEL_NAME: Serving(active=10, loaded=(10,)),
        "korean": Serving(active=3, loaded=(3,)),
    }
    assert (repository.open().version, repository.open(version=9).version) == (10, 9)
    assert repository.open("korean").model == "korean"


def test_a_rollout_and_its_rollback(repository: Repository, add: Add) -> None:
    add(1)
    add(2)
    repository.activate(MODEL_NAME, 1, alone=True)
    assert repository.serving()[MODEL_NAME] == Serving(active=1, previous=2, loaded=(1,))
    with pytest.raises(ChangeRefused, match="version 2 is not loaded; run `bertqa models load bert_qa 2` first"):
        repository.switch(MODEL_NAME, 2)
    repository.load(MODEL_NAME, 2)
    assert repository.open().version == 1
    loaded = config(repository)
    assert list(loaded.version_policy.specific.versions) == [1, 2]
    assert {n: loaded.parameters[f"identity_{n}"].string_value[:4] for n in (1, 2)} == {1: "toy1", 2: "toy2"}
    repository.switch(MODEL_NAME, 2)
    repository.switch(MODEL_NAME, 2)
    assert repository.serving()[MODEL_NAME] == Serving(active=2, previous=1, loaded=(1, 2))
    with pytest.raises(ChangeRefused, match="version 2 is active; switch to another version first"):
        repository.unload(MODEL_NAME, 2)
    repository.unload(MODEL_NAME, 1)
    unloaded = config(repository)
    assert list(unloaded.version_policy.specific.versions) == [2]
    # Triton leaves version 2 alone only if nothing else has changed
    loaded.ClearField("version_policy")
    unloaded.ClearField("version_policy")
    assert loaded == unloaded


def test_what_cannot_be_loaded_is_refused_and_changes_nothing(repository: Repository, add: Add) -> None:
    add(1)
    add(2, target="tensorrt")
    repository.activate(MODEL_NAME, 1, alone=True)
    before = {path: path.read_bytes() for path in repository.root.rglob("*") if path.is_file()}
    for version, message in (
        (3, "bert_qa: there is no version 3, only 1, 2"),
        (2, "versions for cpu and tensorrt cannot be one model; publish the new one under another name"),
    ):
        with pytest.raises(ChangeRefused, match=message):
            repository.load(MODEL_NAME, version)
    with pytest.raises(ChangeRefused, match=r"german: no such model in .*; found: bert_qa"):
        repository.load("german", 1)
    assert before == {path: path.read_bytes() for path in repository.root.rglob("*") if path.is_file()}


def test_engines_of_a_gpu_with_other_lengths_cannot_be_one_model(repository: Repository, add: Add) -> None:
    add(1, target="tensorrt", buckets=(32, 64))
    add(2, target="tensorrt", buckets=(64, 128))
    repository.activate(MODEL_NAME, 1, alone=True)
    assert [*config(repository).instance_group[0].profile] == ["0", "1"]
    with pytest.raises(ChangeRefused, match=r"the buckets \(32, 64\) and \(64, 128\) cannot be one model; publish the"):
        repository.load(MODEL_NAME, 2)


def test_versions_warm_up_with_the_lengths_that_all_of_them_have(repository: Repository, add: Add) -> None:
    add(1, buckets=(32, 64))
    add(2, buckets=(64, 128))
    repository.activate(MODEL_NAME, 1, alone=True)
    repository.load(MODEL_NAME, 2)
    assert [warmup.name for warmup in config(repository).model_warmup] == ["length_64"]


def test_serving_options_survive_every_change(repository: Repository, add: Add) -> None:
    add(1)
    add(2)
    repository.configure(MODEL_NAME, instances=3, threads=1)
    repository.configure(MODEL_NAME, instances=None, threads=None)
    repository.load(MODEL_NAME, 1)
    repository.switch(MODEL_NAME, 1)
    serving = repository.serving()[MODEL_NAME]
    assert (serving.instances, serving.threads) == (3, 1)
    written = config(repository)
    assert (written.instance_group[0].count, written.parameters["threads"].string_value) == (3, "1")


def test_what_serving_json_says_of_versions_that_are_gone_is_forgotten(repository: Repository, add: Add) -> None:
    add(1)
    add(2)
    repository.activate(MODEL_NAME, 1, alone=True)
    repository.activate(MODEL_NAME, 2)
    shutil.rmtree(repository.root / MODEL_NAME)
    assert repository.serving() == {}
    add(1)
    repository.activate(MODEL_NAME, 1, alone=True)
    assert repository.serving()[MODEL_NAME] == Serving(active=1, previous=None, loaded=(1,))


def test_a_file_that_stays_the_same_is_not_written_again(repository: Repository, add: Add) -> None:
    add(1)
    repository.activate(MODEL_NAME, 1)
    path = repository.root / MODEL_NAME / "config.pbtxt"
    os.utime(path, ns=(1, 1))
    repository.switch(MODEL_NAME, 1)
    assert path.stat().st_mtime_ns == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable"),
        ('{"bert_qa": 1}', "serving.json: bert_qa: must be a JSON object"),
        ('{"bert_qa": {"active": 1, "loaded": [1], "weight": 2}}', "serving.json: bert_qa: unknown field 'weight'"),
        ('{"bert_qa": {"active": 2, "loaded": [1]}}', "bert_qa: active is 2, which is not one of the loaded versions"),
    ],
)
def test_a_broken_serving_json_is_named(repository: Repository, add: Add, text: str, message: str) -> None:
    add(1)
    (repository.root / "serving.json").write_text(text)
    with pytest.raises(BundleMismatch, match=message):
        repository.open()


def test_a_repository_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ChangeRefused, match=r"file/models: not writable \(Not a directory\)"):
        Repository(tmp_path / "file" / "models").load(MODEL_NAME, 1)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(st.tuples(st.sampled_from(["load", "unload", "switch", "activate"]), st.integers(1, 4)), max_size=12)
)
def test_any_order_of_changes_leaves_an_active_version_that_is_loaded(
    repository: Repository, add: Add, steps: list[tuple[str, int]]
) -> None:
    for version in (1, 2, 3):
        if version not in repository.versions(MODEL_NAME):
            add(version)
    for name, version in steps:
        with contextlib.suppress(ChangeRefused):
            getattr(repository, name)(MODEL_NAME, version)
        serving = repository.serving()[MODEL_NAME]
        assert serving.active in serving.loaded
        assert list(serving.loaded) == sorted({*serving.loaded})
        if (repository.root / "serving.json").exists():
            assert tuple(config(repository).version_policy.specific.versions) == serving.loaded


def test_changes_at_one_time_are_made_one_after_the_other(repository: Repository, add: Add) -> None:
    models = [f"model{number}" for number in range(8)]
    for model in models:
        add(1, model)
        add(2, model)
    stop = threading.Event()
    seen: list[Exception] = []

    def read() -> None:
        while not stop.is_set():
            try:
                assert len(repository.serving()) == len(models)
            except Exception as error:
                seen.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    writers = [threading.Thread(target=repository.load, args=(model, 1)) for model in models]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    stop.set()
    reader.join()
    assert seen == []
    assert {name: serving.loaded for name, serving in repository.serving().items()} == dict.fromkeys(models, (1, 2))
    assert [path.name for path in repository.root.glob(".*")] == [".lock"]
