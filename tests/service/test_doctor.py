"""Provoke every doctor finding that is not ok; test_rollout.py has those of a running Triton."""

import contextlib
import ctypes
import dataclasses
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from tritonclient.grpc import model_config_pb2

from bertqa.cli.command import parse, status
from bertqa.manifest import MODEL_NAME, Bundle, Manifest
from bertqa.repository import Repository
from bertqa.triton_config import ModelConfig, Serving, to_text
from service.commands.doctor import DoctorOptions, app, triton_installation
from service.commands.doctor.configuration import HARMLESS, check_configuration, differences
from service.commands.doctor.cpu import check_cpu
from service.commands.doctor.diagnose import diagnose
from service.commands.doctor.files import check_files
from service.commands.doctor.finding import Finding
from service.commands.doctor.gpu import check_gpus, check_tensorrt
from service.commands.doctor.ports import check_ports
from service.commands.doctor.shared_memory import check_shared_memory
from service.commands.doctor.triton_installation import check_triton_installation, check_triton_version
from service.commands.doctor.versions import check_version
from service.runtime import triton_install
from tests.support.paths import ROOT
from tests.support.repositories import publish_toy_bundle

Publish = Callable[..., Path]


@pytest.fixture(autouse=True)
def usual_umask() -> Iterator[None]:
    """Others may read what is written, whatever the shell of whoever runs the tests says."""
    before = os.umask(0o022)
    yield
    os.umask(before)


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
        return list(diagnose(parse(DoctorOptions, flags)))

    return examine


def about(findings: list[Finding], subject: str) -> list[str]:
    """The findings about something, without their subject."""
    return [
        f"{each.level} {each.text}; {each.fix}".removesuffix("; ")
        for each in findings
        if each.subject.startswith(subject)
    ]


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
    one(examine(), "repository", "FAIL", "active is 2, which is not one of the loaded versions")


# ---- files ----


def test_files_that_others_cannot_read(
    publish: Publish, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = publish() / "engine.bin"
    engine.chmod(0o600)
    one([*check_files(repository)], "files", "WARN", r"only its owner can read .*engine\.bin.*chmod -R go\+rX")
    engine.chmod(0o644)
    one([*check_files(repository)], "files", "ok", "")
    # as somebody who is not root, which the tests may be
    monkeypatch.setattr(os, "access", lambda path, mode: not (path == engine and mode & os.R_OK))
    one([*check_files(repository)], "files", "FAIL", r"engine\.bin cannot be read; chmod -R u\+rX,go\+rX ")
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    one([*check_files(repository)], "files", "WARN", "readable but not writable")


# ---- bundles ----


def look(repository: Repository, version: int) -> list[Finding]:
    finding, _ = check_version(repository, MODEL_NAME, version, repository.serving()[MODEL_NAME])
    return [finding]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda bundle: (bundle / "engine.bin").write_bytes(b"enginf"),
            "engine.bin has changed since it was published; build",
        ),
        (
            lambda bundle: (bundle / "engine.bin").unlink(),
            "engine.bin has changed since it was published; build it again with",
        ),
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


FIX = "; do not edit it; `bertqa serve` writes it again, or with a running Triton `bertqa models load bert_qa 1`"


def edited(repository: Repository, edit: Callable[[ModelConfig], object], model: str = MODEL_NAME) -> list[str]:
    """What is found after a change of the file."""
    serving = repository.serving()[model]
    config = repository.expected_config(model, serving)
    before = to_text(config)
    edit(config)
    text = to_text(config)
    assert text != before
    (repository.root / model / "config.pbtxt").write_text(text)
    return about([*check_configuration(repository, model, serving)], "config.pbtxt")


def no_queue_policy(config: ModelConfig) -> None:
    config.dynamic_batching.ClearField("default_queue_policy")


def policy(**fields: object) -> Callable[[ModelConfig], None]:
    def edit(config: ModelConfig) -> None:
        for name, value in fields.items():
            setattr(config.dynamic_batching.default_queue_policy, name, value)

    return edit


def int64(config: ModelConfig) -> None:
    for tensor in config.input:
        tensor.data_type = model_config_pb2.TYPE_INT64


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (
            lambda c: setattr(c, "name", "bert"),
            'name is "bert", bertqa writes "bert_qa": .*name of the model directory',
        ),
        (lambda c: setattr(c, "backend", "tensorrt"), 'backend is "tensorrt", bertqa writes "python": another backend'),
        (lambda c: setattr(c, "max_batch_size", 0), "max_batch_size is not set, .* no dynamic batcher, .*#6920, #7150"),
        (lambda c: setattr(c, "max_batch_size", 2), "max_batch_size is 2, bertqa writes 1: .* larger batches fail"),
        (
            int64,
            r'input\[0\]\.data_type is "TYPE_INT64", bertqa writes "TYPE_INT32" \(and 2 more\): the service',
        ),
        (lambda c: c.input.pop(), "input is .*: the service sends and reads exactly these tensors"),
        (lambda c: c.output[1].dims.append(-1), r"output\[1\]\.dims is .*the dims must not include the batch.*#5721"),
        (
            lambda c: c.ClearField("dynamic_batching"),
            "dynamic_batching is not set, .*: queue limits and timeouts .*#6920",
        ),
        (no_queue_policy, r"default_queue_policy is not set, .*: the queue grows without limit \(#6920\)"),
        (policy(allow_timeout_override=False), "allow_timeout_override is not set, .*still computed .#7512"),
        (policy(timeout_action=1), 'timeout_action is "DELAY", .*late requests are still computed .#7512'),
        (policy(max_queue_size=0), "max_queue_size is not set, bertqa writes 256: the queue grows without limit"),
        (policy(default_timeout_microseconds=0), "default_timeout_microseconds is not set, .*waits forever"),
        (lambda c: setattr(c.instance_group[0], "count", 1), "with a single instance stalls one request in a hundred"),
        (
            lambda c: setattr(c.instance_group[0], "kind", 0),
            "kind is not set, .*Triton chooses the device.*#7628, #5863",
        ),
        (lambda c: c.ClearField("instance_group"), "instance_group is not set, .*Triton chooses the device"),
        (lambda c: c.ClearField("model_warmup"), "model_warmup is not set, .*the first request of a length .*#3473"),
        (lambda c: c.model_warmup.pop(0), "model_warmup is .*the first request of a length takes seconds"),
        (
            lambda c: c.ClearField("version_policy"),
            "version_policy is not set, .*other versions than those in serving.json",
        ),
        (lambda c: c.version_policy.specific.versions.append(2), r"versions is \[.1., .2.\].*Triton would load other"),
        (
            lambda c: setattr(c.parameters["identity_1"], "string_value", "other"),
            "identity_1.* is .other., bertqa writes .toy-cpu-fp32-000000000000.: the service rejects an engine",
        ),
    ],
)
def test_every_harmful_difference_of_a_configuration_says_what_it_means(
    publish: Publish, repository: Repository, edit: Callable[[ModelConfig], object], words: str
) -> None:
    publish()
    found = edited(repository, edit)
    assert len(found) == 1, found
    assert re.search(words, found[0]), found
    assert found[0].startswith("FAIL ")
    assert found[0].endswith(FIX)


def test_a_queue_policy_where_there_is_a_single_instance(publish: Publish, repository: Repository) -> None:
    publish()
    repository.configure(MODEL_NAME, instances=1)
    (found,) = edited(repository, policy(max_queue_size=256))
    assert re.search("^FAIL .*bertqa writes not set: .*with a single instance stalls one request in a hundred", found)


@pytest.mark.parametrize(
    "edit",
    [
        lambda c: setattr(c.instance_group[0], "count", 3),
        policy(max_queue_size=16),
        lambda c: setattr(c.parameters["threads"], "string_value", "4"),
        lambda c: setattr(c.parameters["mine"], "string_value", "4"),
    ],
)
def test_a_configuration_that_was_edited_without_harm(
    publish: Publish, repository: Repository, edit: Callable[[ModelConfig], object]
) -> None:
    publish()
    (found,) = edited(repository, edit)
    assert found.startswith("WARN ")
    assert found.endswith(HARMLESS + FIX)


def test_a_configuration_that_is_missing_or_cannot_be_read(publish: Publish, repository: Repository) -> None:
    publish()
    path = repository.root / MODEL_NAME / "config.pbtxt"
    serving = repository.serving()[MODEL_NAME]
    path.write_text(path.read_text() + "\n# a remark changes nothing\n")
    one([*check_configuration(repository, MODEL_NAME, serving)], "config", "ok", "as generated, version 1 loaded")
    path.write_text(path.read_text().replace('name: "bert_qa"', 'nmae: "bert_qa"'))
    one([*check_configuration(repository, MODEL_NAME, serving)], "config", "FAIL", "is invalid: .*nmae.*do not edit")
    path.write_bytes(b"\xff")
    one([*check_configuration(repository, MODEL_NAME, serving)], "config", "FAIL", "is invalid: .*decode")
    path.unlink()
    one([*check_configuration(repository, MODEL_NAME, serving)], "config", "FAIL", "No such file")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (
            lambda c: setattr(c.instance_group[0], "kind", model_config_pb2.ModelInstanceGroup.KIND_CPU),
            'kind is "KIND_CPU", bertqa writes "KIND_GPU": Triton chooses.*#5863',
        ),
        (lambda c: c.instance_group[0].ClearField("profile"), "profile is not set, .*uses only the first profile"),
        (lambda c: setattr(c, "max_batch_size", 2), "max_batch_size is 2, bertqa writes 1: .*larger batches fail"),
        (lambda c: setattr(c.optimization.cuda, "graphs", False), "graphs is not set, .*every kernel of every call"),
        (
            lambda c: c.optimization.cuda.graph_spec.add(batch_size=1),
            "graph_spec is .*, bertqa writes not set: Triton tries it with the profile of every length",
        ),
    ],
)
def test_harmful_differences_for_a_gpu(
    publish: Publish, repository: Repository, edit: Callable[[ModelConfig], object], words: str
) -> None:
    publish(target="tensorrt", model="gpu")
    serving = repository.serving()["gpu"]
    one([*check_configuration(repository, "gpu", serving)], "config", "ok", "as generated")
    (found,) = edited(repository, edit, "gpu")
    assert found.startswith("FAIL ")
    assert re.search(words, found), found


def test_the_identity_of_a_version_that_is_not_loaded_harms_nobody(publish: Publish, repository: Repository) -> None:
    publish()
    publish(2)
    (found,) = edited(repository, lambda c: c.parameters.pop("identity_2"))
    assert found.startswith("WARN parameters.identity_2 is not set")


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
@pytest.mark.parametrize("instances", [1, 2, 5])
def test_a_written_configuration_is_read_back_without_a_difference(
    publish: Publish, repository: Repository, target: str, instances: int
) -> None:
    for version in (1, 2, 3):
        publish(version, model="x", target=target)
    repository.configure("x", instances=instances)
    repository.load("x", 3)
    serving = repository.serving()["x"]
    assert differences(repository.written_config("x"), repository.expected_config("x", serving)) == []
    assert repository.is_configured("x")


# ---- Triton ----


def test_no_triton_or_one_that_cannot_run(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifests = {"bert_qa 1": bundle.manifest}
    monkeypatch.setattr(triton_install, "WHEEL", "no-such-wheel")
    one(
        [*check_triton_installation(manifests)],
        "Triton",
        "FAIL",
        "neither tritonserver on PATH nor .*pip install --no-deps",
    )
    for script, words in (
        ("echo 'error while loading shared libraries: libb64.so' >&2; exit 127", "does not run.*libb64"),
        ("exit 1", "does not run on this machine: it printed nothing"),
        (
            "echo '| server_version | 2.41.0 |'; exec sleep 60",
            r"2\.41\.0, but bert_qa 1 needs from 2\.49\.0 to any",
        ),
    ):
        server = tmp_path / "tritonserver"
        server.write_text(f"#!/bin/sh\n{script}\n")
        server.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        one([*check_triton_installation(manifests)], "Triton", "FAIL", words)


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
    one([*check_triton_installation({"bert_qa 1": bundle.manifest})], "Triton", "FAIL", words)


def test_a_triton_without_a_backend_for_tensorrt(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifests = {"x 1": dataclasses.replace(bundle.manifest, target="tensorrt")}
    one(
        [*check_triton_installation(manifests)], "Triton", "FAIL", "has no backend 'tensorrt', which x 1 needs; use the"
    )
    server = tmp_path / "tritonserver"  # in NVIDIA's image
    server.write_text("#!/bin/sh\necho '| server_version | 2.70.0 |'; exec sleep 60\n")
    server.chmod(0o755)
    (tmp_path / "backends" / "tensorrt").mkdir(parents=True)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    one([*check_triton_installation(manifests)], "Triton", "FAIL", "tritonserver has no backend 'tensorrt'")
    monkeypatch.setattr(triton_installation, "BACKENDS", tmp_path / "backends")
    one([*check_triton_installation(manifests)], "Triton", "ok", r"tritonserver, 2\.70\.0")


def test_versions_compare_as_numbers(bundle: Bundle) -> None:
    narrow = dataclasses.replace(bundle.manifest, triton=("2.9.0", "2.51.0"))
    for version, level in (("2.51.0", "ok"), ("2.9.0", "ok"), ("2.8.9", "FAIL"), ("2.100.0", "FAIL"), ("3.0", "FAIL")):
        one([check_triton_version("Triton", version, "here", {"x 1": narrow})], "Triton", level, version)


def test_a_triton_that_does_not_answer_is_named(publish: Publish, examine: Callable[..., list[Finding]]) -> None:
    publish()
    findings = examine("--triton-url", "127.0.0.1:1")
    one(findings, "Triton", "FAIL", "Triton at 127.0.0.1:1 does not answer: .*; give its address with --triton-url")
    one(findings, "CPU", "ok", "not checked, because Triton runs elsewhere")
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
            "no bf16 instructions, which x 1 was built for.*build it agai",
        ),
        ("bf16", ("avx512_bf16",), ("amx_bf16",), "WARN", "lacks avx512_bf16, which x 1 was built and measured with"),
        ("int8", ("avx2", "avx512_vnni"), ("avx2",), "FAIL", "accumulates int8 products in 16 bits.*build it again"),
        ("int8", ("avx2",), ("avx2",), "ok", "avx2"),
        ("fp32", ("avx2", "avx512f"), ("avx2",), "WARN", "lacks avx512f"),
        ("fp32", ("avx2",), ("avx2", "avx512f"), "ok", "has what x 1 was built with: avx2"),
    ],
)
def test_a_cpu_that_lacks_what_the_engine_was_built_with(
    bundle: Bundle, precision: str, built: tuple[str, ...], has: tuple[str, ...], level: str, words: str
) -> None:
    manifest = dataclasses.replace(bundle.manifest, precision=precision, cpu_features=built)
    one([*check_cpu({"x 1": manifest}, has, is_here=True)], "CPU", level, words)


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
    return [*check_gpus({"x 1": manifest}, {"x": Serving(active=1, loaded=(1,), gpus=gpus)}, is_here=True)]


def test_a_gpu_that_is_not_there_or_not_the_one(gpu_manifest: Manifest, nvidia_smi: Callable[[str], None]) -> None:
    if shutil.which("nvidia-smi") is None:
        one(graphics(gpu_manifest), "GPU", "FAIL", "finds none, but x 1 needs one; install NVIDIA's driver")
    nvidia_smi("")  # as it ends without a driver
    one(graphics(gpu_manifest), "GPU", "FAIL", "finds none")
    nvidia_smi("NVIDIA H200, 570.86.15, 9.0\nTesla T4, 570.86.15, 7.5")
    one(graphics(gpu_manifest, 0), "GPU", "ok", "NVIDIA H200, compute capability 9.0, as x 1 needs")
    one(graphics(gpu_manifest, 1), "GPU", "FAIL", r"Tesla T4 has compute capability 7\.5, but x 1 was built for 9\.0")
    one(
        graphics(gpu_manifest, 2),
        "GPU",
        "FAIL",
        "configured for GPU 2, but the number of GPUs is 2; build it with other --gpus",
    )
    assert [line.split()[0] for line in about(graphics(gpu_manifest), "GPU")] == ["ok", "FAIL"]
    assert about(graphics(gpu_manifest), "driver") == []
    nvidia_smi("NVIDIA H200, 535.183.01, 9.0")
    one(graphics(gpu_manifest), "driver", "WARN", r"535\.183\.01 is older than 560\.28")
    nvidia_smi("NVIDIA H100 PCIe, 570.86.15, 9.0")
    one(graphics(gpu_manifest), "GPU", "WARN", "differs from NVIDIA H200, which x 1 was built on.*build it again")


@pytest.mark.parametrize(
    ("number", "level", "words"),
    [
        (
            None,
            "WARN",
            "no libnvinfer found, so its version is unknown; x 1 needs 10.9.0; run the doctor in Triton's image",
        ),
        (100900, "ok", "10.9.0, as x 1 needs"),
        (
            101303,
            "FAIL",
            "is 10.13.3, but x 1 was built with 10.9.0; build it again with the builder of Triton's release",
        ),
        (8601, "FAIL", "is 8.6.1, but x 1 was built with 10.9.0"),
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
    one([check_tensorrt("x 1", gpu_manifest.runtime)], "TensorRT", level, words)


@pytest.mark.parametrize(("number", "level"), [(100900, "ok"), (101303, "ok"), (100801, "FAIL"), (110400, "FAIL")])
def test_an_engine_for_later_versions_too(
    gpu_manifest: Manifest, monkeypatch: pytest.MonkeyPatch, number: int, level: str
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(getInferLibVersion=lambda: number))
    runtime = {**gpu_manifest.runtime, "version_compatible": "true"}
    words = "x 1 needs, and --backend-config=tensorrt,version-compatible=true$" if level == "ok" else "x 1 was built"
    one([check_tensorrt("x 1", runtime)], "TensorRT", level, words)


def test_an_engine_for_other_gpus_too(gpu_manifest: Manifest, nvidia_smi: Callable[[str], None]) -> None:
    runtime = {**gpu_manifest.runtime, "hardware_compatible": "true"}
    manifest = dataclasses.replace(gpu_manifest, runtime=runtime)
    nvidia_smi("NVIDIA A10, 570.86.15, 8.6\nTesla T4, 570.86.15, 7.5")
    one(graphics(manifest, 0), "GPU", "ok", r"NVIDIA A10, compute capability 8\.6, as x 1 needs")
    one(graphics(manifest, 1), "GPU", "FAIL", r"Tesla T4 has compute capability 7\.5")


# ---- ports and memory ----


def test_ports_that_are_taken_and_by_whom(url: str) -> None:
    ours = int(url.rpartition(":")[2])
    one([*check_ports("127.0.0.1", ours, None)], f"port {ours}", "ok", "the service is running")
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        taken = listener.getsockname()[1]
        one(
            [*check_ports("127.0.0.1", ours, taken)][:2],
            f"port {taken}",
            "WARN",
            r"taken by another program; .*would use \d+",
        )
    one([*check_ports("192.0.2.1", 8000, None)], "port 8000", "FAIL", "192.0.2.1: cannot listen there")


def test_too_little_shared_memory(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    serving = {MODEL_NAME: Serving(active=7, loaded=(7,), instances=3)}
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=2, f_frsize=2**20))
    one(
        [check_shared_memory(serving, [bundle])],
        "shared",
        "FAIL",
        "2 MiB free in /dev/shm, 3 engines need 12; .*--shm-size",
    )
    gpu = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, target="tensorrt"))
    one([check_shared_memory(serving, [gpu])], "shared", "ok", "not needed")
