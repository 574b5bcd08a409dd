"""Every line of the doctor that is not ok, provoked; with a running Triton in test_rollout.py."""

import contextlib
import ctypes
import dataclasses
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from bertqa.command import parse, status
from bertqa.manifest import MODEL_NAME, Bundle, Manifest
from bertqa.repository import Repository
from bertqa.triton_config import Serving
from service import doctor
from service.commands.doctor import DoctorOptions, app
from service.doctor import Finding
from service.runtime import triton_install
from tests.support.paths import ROOT
from tests.support.repositories import publish_toy_bundle

Publish = Callable[..., Path]


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "model_repository")


@pytest.fixture
def publish(bundle: Bundle, repository: Repository) -> Publish:
    """Puts a version of the toy model, with an engine of a few bytes, into the repository; fields as in `Manifest`."""

    def publish(version: int = 1, model: str = MODEL_NAME, **fields: object) -> Path:
        files = {"engine.bin": "engine", "questions.json": "[]"}
        directory = publish_toy_bundle(repository, bundle, version, model, files=files, **fields)
        if version == 1:
            repository.activate(model, version)
        return directory

    return publish


@pytest.fixture
def examine(repository: Repository) -> Callable[..., list[Finding]]:
    """Runs the whole examination; words are flags."""

    def examine(*words: str) -> list[Finding]:
        flags = ["--repository", str(repository.root), "--port", "0", "--triton-grpc-port", "1", *words]
        return list(doctor.examine(parse(DoctorOptions, flags)))

    return examine


def about(findings: list[Finding], subject: str) -> list[str]:
    """The findings about something, without their subject."""
    return [f"{each.level} {each.text}" for each in findings if each.subject.startswith(subject)]


def one(findings: list[Finding], subject: str, level: str, words: str) -> None:
    """The only finding about something is this one."""
    found = about(findings, subject)
    assert len(found) == 1, found
    assert found[0].startswith(f"{level} "), found
    assert re.search(words, found[0]), found


def test_a_repository_in_order_is_all_ok(
    publish: Publish, examine: Callable[..., list[Finding]], repository: Repository
) -> None:
    publish()
    publish(2)
    repository.configure(MODEL_NAME)
    findings = examine()
    elsewhere = [each for each in findings if each.subject.startswith("port 80")]  # others may run here
    assert {each.level for each in findings if each not in elsewhere} == {"ok"}, [str(each) for each in findings]
    subjects = [each.subject.split()[0] for each in findings]
    assert list(dict.fromkeys(subjects)) == [
        *("files", "bundle", "tokenizer", "config.pbtxt", "Triton", "CPU", "GPU", "port", "shared"),
    ]
    one(findings, "bundle bert_qa 1", "ok", "active, toy-cpu-fp32-000000000000, 3 files")
    one(findings, "bundle bert_qa 2", "ok", "not loaded")
    one(findings, "Triton", "ok", r"tritonserver, 2\.\d+\.\d+$")


def test_the_exit_code_says_whether_something_fails(
    publish: Publish, repository: Repository, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--repository", str(repository.root), "--port", "0", "--triton-grpc-port", "1"]
    assert status(app, flags) == 1
    assert re.fullmatch(
        r"FAIL  repository: .*bert_qa: holds no built version; run `python -m engine_builder .*\n",
        capsys.readouterr().out,
    )
    publish()
    done = subprocess.run(
        [sys.executable, "-m", "bertqa.cli", "doctor", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert all(line[:4] in ("ok  ", "WARN") for line in done.stdout.splitlines())
    assert "ok    bundle bert_qa 1: active, " in done.stdout


def test_a_broken_serving_json(publish: Publish, repository: Repository, examine: Callable[..., list[Finding]]) -> None:
    publish()
    (repository.root / "serving.json").write_text('{"bert_qa": {"active": 2, "loaded": [1]}}')
    one(examine(), "repository", "FAIL", "active is 2, which is not among the loaded")


# ---- files ----


def test_files_that_others_cannot_read(
    publish: Publish, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = publish() / "engine.bin"
    engine.chmod(0o600)
    one([*doctor.files_of(repository)], "files", "WARN", r"engine\.bin can be read by its owner alone.*chmod -R go\+rX")
    engine.chmod(0o644)
    one([*doctor.files_of(repository)], "files", "ok", "")
    # as somebody who is not root, which the tests may be
    monkeypatch.setattr(os, "access", lambda path, mode: not (path == engine and mode & os.R_OK))
    one([*doctor.files_of(repository)], "files", "FAIL", r"engine\.bin cannot be read; chmod -R u\+rX,go\+rX ")
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    one([*doctor.files_of(repository)], "files", "WARN", "can be read but not written")


# ---- bundles ----


def look(repository: Repository, version: int) -> list[Finding]:
    return [*doctor.bundle_of(repository, MODEL_NAME, version, repository.serving()[MODEL_NAME], [])]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda bundle: (bundle / "engine.bin").write_bytes(b"enginf"), "engine.bin is not as it was published; build"),
        (lambda bundle: (bundle / "engine.bin").unlink(), "engine.bin is not as it was published; build it again with"),
        (
            lambda bundle: (bundle / "tokenizer.json").write_text("{}"),
            "not the tokenizer that the engine was built wit",
        ),
        (lambda bundle: (bundle / "manifest.json").write_text("{"), r"manifest\.json: not readable"),
        (lambda bundle: (bundle / "manifest.json").write_text('{"format": 1}'), "manifest format 1, .*build it again"),
        (lambda bundle: (bundle / "questions.json").write_text("["), "questions|Expecting"),
    ],
    ids=["changed", "missing", "tokenizer", "manifest", "an earlier release", "questions"],
)
def test_a_bundle_that_is_not_whole(
    publish: Publish, repository: Repository, version: int, spoil: Callable[[Path], None], words: str
) -> None:
    publish(1)
    publish(2)
    spoil(repository.directory(MODEL_NAME, version))
    # what is not loaded harms nobody yet
    one(look(repository, version), "bundle", "FAIL" if version == 1 else "WARN", words)


def test_a_broken_active_version_can_be_rolled_back(publish: Publish, repository: Repository) -> None:
    publish(1)
    bundle = publish(2)
    repository.activate(MODEL_NAME, 2)
    (bundle / "engine.bin").write_bytes(b"?")
    one(look(repository, 2), "bundle", "FAIL", "or `bertqa models rollback bert_qa`")


def test_a_tokenizer_with_more_tokens_than_the_engine(publish: Publish, repository: Repository) -> None:
    publish(vocabulary_size=7)
    one(look(repository, 1), "bundle", "FAIL", r"tokenizer\.json: \d+ tokens, but the engine embeds 7; build it again")


# ---- config.pbtxt ----


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('name: "bert_qa"', 'name: "bert"', "name is 'bert', not that of its directory"),
        ('backend: "python"', 'backend: "tensorrt"', "backend 'tensorrt' cannot run an engine for cpu"),
        (
            "max_batch_size: 1",
            "max_batch_size: 0",
            r"max_batch_size is 0, so there is no dynamic batcher.*#6920, #7150",
        ),
        ("TYPE_INT32", "TYPE_INT64", "tensors must be input_ids, .* of TYPE_INT32"),
        (r"dims: \[ -1 \] }", "dims: [ -1, -1 ] }", r"dims must be \[ -1 \].*#5721"),
        (r"dynamic_batching \{.*?\n\}", "", r"dynamic_batching is not set: limits and timeouts"),
        (r"  default_queue_policy \{.*?\n  \}", "", "default_queue_policy is not set: the queue grows without end"),
        ("allow_timeout_override: true", "", "must reject, and allow_timeout_override.*#7512"),
        ("timeout_action: REJECT", "timeout_action: DELAY", "must reject, and allow_timeout_override"),
        (r"max_queue_size: \d+", "", "max_queue_size is not set: the queue grows without end"),
        (r"default_timeout_microseconds: \d+", "", "default_timeout_microseconds is not set: .* without end"),
        ("count: 2", "count: 1", "with a single instance stalls one request in a hundred"),
        ("kind: KIND_CPU", "kind: KIND_AUTO", r"instance_group must be KIND_CPU.*#7628, #5863"),
        (r"instance_group \[.*?\]\n", "", "instance_group must be KIND_CPU"),
        (r"model_warmup \{.*\n\}", "", "model_warmup has no request of 32 tokens"),
        (r"version_policy.*?\n", "", "version_policy must name version 1, as serving.json does"),
        (r"versions: \[ 1 \]", "versions: [ 2 ]", "version_policy must name version 1"),
        (r"toy-cpu-fp32-0+", "other", "parameters must have identity_1 toy-cpu-fp32-000000000000"),
        (r'name: "bert_qa"', 'nmae: "bert_qa"', "cannot be used, .*nmae"),
    ],
)
def test_every_trap_of_a_configuration_is_told_with_the_fix(
    publish: Publish, repository: Repository, old: str, new: str, words: str
) -> None:
    publish()
    path = repository.root / MODEL_NAME / "config.pbtxt"
    spoiled = re.sub(old, new, path.read_text(), flags=re.DOTALL)
    assert spoiled != path.read_text()
    path.write_text(spoiled)
    found = about([*doctor.config_of(repository, MODEL_NAME, repository.serving()[MODEL_NAME])], "config.pbtxt")
    assert any(re.search(words, line) for line in found), found
    fix = "; never edit it: `bertqa serve` writes it again, and once Triton runs `bertqa models load bert_qa 1`"
    assert all(line.startswith("FAIL ") and line.endswith(fix) for line in found)


def test_a_configuration_that_was_edited_without_harm_or_is_missing(publish: Publish, repository: Repository) -> None:
    publish()
    path = repository.root / MODEL_NAME / "config.pbtxt"
    path.write_text(path.read_text().replace("count: 2", "count: 3"))
    serving = repository.serving()[MODEL_NAME]
    one(
        [*doctor.config_of(repository, MODEL_NAME, serving)], "config", "WARN", "not as it was generated; never edit it"
    )
    path.unlink()
    one([*doctor.config_of(repository, MODEL_NAME, serving)], "config", "FAIL", "No such file")


def test_the_traps_of_a_gpu(publish: Publish, repository: Repository) -> None:
    publish(target="tensorrt", model="gpu")
    serving = repository.serving()["gpu"]
    path = repository.root / "gpu" / "config.pbtxt"
    generated = path.read_text()
    one([*doctor.config_of(repository, "gpu", serving)], "config", "ok", "as it was generated")
    for old, new, words in (
        ("kind: KIND_GPU", "kind: KIND_CPU", "instance_group must be KIND_GPU.*#5863"),
        ('profile: [ "0", "1" ]', "", "must name the profile of every bucket, or Triton uses the first alone"),
        ("max_batch_size: 1", "max_batch_size: 2", "max_batch_size is 2, and the engine takes 1: larger batches fail"),
        ("graphs: true", "", r"optimization\.cuda\.graphs is not set: every kernel of every call is launched"),
        ("graphs: true", "graphs: true graph_spec { batch_size: 1 }", "graph_spec is tried with the profile of every"),
    ):
        assert old in generated
        path.write_text(generated.replace(old, new))
        one([*doctor.config_of(repository, "gpu", serving)], "config", "FAIL", words)


def test_whatever_the_generator_writes_steps_into_no_trap(bundle: Bundle) -> None:
    from bertqa.triton_config import triton_config

    for target in ("cpu", "tensorrt"):
        for instances in (1, 2, 5):
            manifest = dataclasses.replace(bundle.manifest, target=target)
            manifests = {1: manifest, 2: manifest, 3: manifest}
            serving = Serving(active=2, loaded=(2, 3), instances=instances)
            config = text_format.Parse(triton_config("x", manifests, serving), model_config_pb2.ModelConfig())
            assert [*doctor.traps(config, "x", serving, {2: manifest, 3: manifest})] == []


# ---- Triton ----


def test_no_triton_or_one_that_cannot_run(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifests = {"bert_qa 1": bundle.manifest}
    monkeypatch.setattr(triton_install, "WHEEL", "no-such-wheel")
    one([*doctor.installation(manifests)], "Triton", "FAIL", "neither tritonserver on PATH nor .*pip install --no-deps")
    for script, words in (
        ("echo 'error while loading shared libraries: libb64.so' >&2; exit 127", "does not run.*libb64"),
        ("exit 1", "does not run on this machine: it says nothing"),
        (
            "echo '| server_version | 2.41.0 |'; exec sleep 60",
            r"2\.41\.0, and bert_qa 1 runs under from 2\.49\.0 to any",
        ),
    ):
        server = tmp_path / "tritonserver"
        server.write_text(f"#!/bin/sh\n{script}\n")
        server.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        one([*doctor.installation(manifests)], "Triton", "FAIL", words)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("_PYTHON", "3.7", r"runs models with Python 3\.8, .* this is Python 3\.7"),
        (
            "_libpython",
            lambda: (_ for _ in ()).throw(triton_install.TritonError("libpython: apt install")),
            "apt install",
        ),
    ],
)
def test_a_triton_without_the_python_that_it_needs(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, name: str, value: object, words: str
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(triton_install, name, value)
    one([*doctor.installation({"bert_qa 1": bundle.manifest})], "Triton", "FAIL", words)


def test_a_triton_without_a_backend_for_tensorrt(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifests = {"x 1": dataclasses.replace(bundle.manifest, target="tensorrt")}
    one([*doctor.installation(manifests)], "Triton", "FAIL", "has no backend for TensorRT, which x 1 needs; use the")
    server = tmp_path / "tritonserver"  # in NVIDIA's image
    server.write_text("#!/bin/sh\necho '| server_version | 2.70.0 |'; exec sleep 60\n")
    server.chmod(0o755)
    (tmp_path / "backends" / "tensorrt").mkdir(parents=True)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    one([*doctor.installation(manifests)], "Triton", "FAIL", "tritonserver has no backend for TensorRT")
    monkeypatch.setattr(doctor, "BACKENDS", tmp_path / "backends")
    one([*doctor.installation(manifests)], "Triton", "ok", r"tritonserver, 2\.70\.0")


def test_versions_compare_as_numbers(bundle: Bundle) -> None:
    narrow = dataclasses.replace(bundle.manifest, triton=("2.9.0", "2.51.0"))
    for version, level in (("2.51.0", "ok"), ("2.9.0", "ok"), ("2.8.9", "FAIL"), ("2.100.0", "FAIL"), ("3.0", "FAIL")):
        one([*doctor._in_range("Triton", version, "here", {"x 1": narrow})], "Triton", level, version)


def test_a_triton_that_does_not_answer_is_named(publish: Publish, examine: Callable[..., list[Finding]]) -> None:
    publish()
    findings = examine("--triton-url", "127.0.0.1:1")
    one(findings, "Triton", "FAIL", "Triton at 127.0.0.1:1 does not answer: .*; give its address with --triton-url")
    one(findings, "CPU", "ok", "not looked at, for Triton runs elsewhere")
    one(examine("--triton-url", "no-such-host.invalid:1"), "Triton", "FAIL", "--triton-url no-such-host.invalid:1")


# ---- processor ----


@pytest.mark.parametrize(
    ("precision", "built", "has", "level", "words"),
    [
        (
            "bf16",
            ("avx512f", "avx512_bf16"),
            ("avx2",),
            "FAIL",
            "no bf16 instructions, and x 1 was built .*build it agai",
        ),
        ("bf16", ("avx512_bf16",), ("amx_bf16",), "WARN", "lacks avx512_bf16, which x 1 was built and measured with"),
        ("int8", ("avx2", "avx512_vnni"), ("avx2",), "FAIL", "adds int8 products up in 16 bits.*build it again"),
        ("int8", ("avx2",), ("avx2",), "ok", "avx2"),
        ("fp32", ("avx2", "avx512f"), ("avx2",), "WARN", "lacks avx512f"),
        ("fp32", ("avx2",), ("avx2", "avx512f"), "ok", "has what x 1 was built with: avx2"),
    ],
)
def test_a_cpu_that_lacks_what_the_engine_was_built_with(
    bundle: Bundle, precision: str, built: tuple[str, ...], has: tuple[str, ...], level: str, words: str
) -> None:
    manifest = dataclasses.replace(bundle.manifest, precision=precision, cpu_features=built)
    one([*doctor.processor({"x 1": manifest}, has, here=True)], "CPU", level, words)


# ---- graphics ----


@pytest.fixture
def gpu_manifest(bundle: Bundle) -> Manifest:
    runtime = {"tensorrt": "10.9.0", "compute_capability": "9.0", "driver": "560.28", "gpu": "NVIDIA H200"}
    return dataclasses.replace(bundle.manifest, target="tensorrt", runtime=runtime)


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a program of that name on PATH that prints these lines."""

    def nvidia_smi(lines: str) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\ncat <<'E'\n{lines}\nE\n" if lines else "#!/bin/sh\nexit 9\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return nvidia_smi


def graphics(manifest: Manifest, *gpus: int) -> list[Finding]:
    return [*doctor.graphics({"x 1": manifest}, {"x": Serving(active=1, loaded=(1,), gpus=gpus)}, here=True)]


def test_a_gpu_that_is_not_there_or_not_the_one(gpu_manifest: Manifest, nvidia_smi: Callable[[str], None]) -> None:
    if shutil.which("nvidia-smi") is None:
        one(graphics(gpu_manifest), "GPU", "FAIL", "finds none, and x 1 needs one; install NVIDIA's driver")
    nvidia_smi("")  # as it ends without a driver
    one(graphics(gpu_manifest), "GPU", "FAIL", "finds none")
    nvidia_smi("NVIDIA H200, 570.86.15, 9.0\nTesla T4, 570.86.15, 7.5")
    one(graphics(gpu_manifest, 0), "GPU", "ok", "NVIDIA H200, compute capability 9.0, as x 1 needs")
    one(graphics(gpu_manifest, 1), "GPU", "FAIL", r"Tesla T4 has compute capability 7\.5, and x 1 was built for 9\.0")
    one(graphics(gpu_manifest, 2), "GPU", "FAIL", "configured for GPU 2, and there are 2; build it with other --gpus")
    assert [line.split()[0] for line in about(graphics(gpu_manifest), "GPU")] == ["ok", "FAIL"]
    assert about(graphics(gpu_manifest), "driver") == []
    nvidia_smi("NVIDIA H200, 535.183.01, 9.0")
    one(graphics(gpu_manifest), "driver", "WARN", r"535\.183\.01 is older than 560\.28")
    nvidia_smi("NVIDIA H100 PCIe, 570.86.15, 9.0")
    one(graphics(gpu_manifest), "GPU", "WARN", "another model than NVIDIA H200, which x 1 was built on.*build it again")


@pytest.mark.parametrize(
    ("number", "level", "words"),
    [
        (None, "WARN", "no libnvinfer here to tell its version; x 1 needs 10.9.0: run the doctor in Triton's image"),
        (100900, "ok", "10.9.0, as x 1 needs"),
        (
            101303,
            "FAIL",
            "is 10.13.3, and x 1 was built with 10.9.0; build it again with the builder of the same release",
        ),
        (8601, "FAIL", "is 8.6.1, and x 1 was built with 10.9.0"),
    ],
)
def test_the_version_of_tensorrt(
    gpu_manifest: Manifest, monkeypatch: pytest.MonkeyPatch, number: int | None, level: str, words: str
) -> None:
    def load(_: str) -> SimpleNamespace:
        if number is None:
            raise OSError("cannot open shared object file")
        return SimpleNamespace(getInferLibVersion=lambda: number)

    monkeypatch.setattr(ctypes, "CDLL", load)
    one([doctor._tensorrt("x 1", gpu_manifest.runtime)], "TensorRT", level, words)


@pytest.mark.parametrize(("number", "level"), [(100900, "ok"), (101303, "ok"), (100801, "FAIL"), (110400, "FAIL")])
def test_an_engine_for_later_versions_too(
    gpu_manifest: Manifest, monkeypatch: pytest.MonkeyPatch, number: int, level: str
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(getInferLibVersion=lambda: number))
    runtime = {**gpu_manifest.runtime, "version_compatible": "true"}
    words = "x 1 needs, and --backend-config=tensorrt,version-compatible=true$" if level == "ok" else "x 1 was built"
    one([doctor._tensorrt("x 1", runtime)], "TensorRT", level, words)


def test_an_engine_for_other_gpus_too(gpu_manifest: Manifest, nvidia_smi: Callable[[str], None]) -> None:
    runtime = {**gpu_manifest.runtime, "hardware_compatible": "true"}
    manifest = dataclasses.replace(gpu_manifest, runtime=runtime)
    nvidia_smi("NVIDIA A10, 570.86.15, 8.6\nTesla T4, 570.86.15, 7.5")
    one(graphics(manifest, 0), "GPU", "ok", r"NVIDIA A10, compute capability 8\.6, as x 1 needs")
    one(graphics(manifest, 1), "GPU", "FAIL", r"Tesla T4 has compute capability 7\.5")


# ---- ports and memory ----


def test_ports_that_are_taken_and_by_whom(url: str) -> None:
    ours = int(url.rpartition(":")[2])
    one([*doctor.ports("127.0.0.1", ours, None)], f"port {ours}", "ok", "the service is running")
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        taken = listener.getsockname()[1]
        one(
            [*doctor.ports("127.0.0.1", ours, taken)][:2],
            f"port {taken}",
            "WARN",
            r"taken by something else; .*would use \d+",
        )
    one([*doctor.ports("192.0.2.1", 8000, None)], "port 8000", "FAIL", "192.0.2.1: cannot listen there")


def test_too_little_shared_memory(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    serving = {MODEL_NAME: Serving(active=7, loaded=(7,), instances=3)}
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=2, f_frsize=2**20))
    one(
        [doctor.shared_memory(serving, [bundle])],
        "shared",
        "FAIL",
        "2 MiB free in /dev/shm, 3 engines need 12; .*--shm-size",
    )
    gpu = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, target="tensorrt"))
    one([doctor.shared_memory(serving, [gpu])], "shared", "ok", "not needed")
