"""Look for what would go wrong before it does: behind ``bertqa doctor``.

Prints a line for each thing it looked at: ``ok``, ``WARN`` for what works worse than it could, ``FAIL`` with what mends
it. It changes nothing and may be run beside a service that answers.
"""

import asyncio
import ctypes
import http.client
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from bertqa.hardware import AMPERE, BF16, INT8, cpu_features
from bertqa.manifest import QUESTIONS_FILE, Bundle, BundleMismatch, Manifest, changed_files, rebuild
from bertqa.repository import CONFIG_FILE, Repository
from bertqa.triton_config import Serving
from bertqa.windows import INPUT_NAMES, OUTPUT_NAMES
from service.commands.doctor import DoctorOptions
from service.rollout import RolloutFailed, Servers, ask, tls_of
from service.runtime.ports import LOOPBACK, PortError, TritonPorts, free_port
from service.runtime.triton_install import TritonError, TritonInstallation, find_triton
from service.settings import Settings

SHARED_MEMORY = Path("/dev/shm")
SHARED_MEMORY_OF_AN_ENGINE = 4 * 2**20
"""Bytes that the Python backend takes for each engine, when it has grown once or twice."""
BACKENDS = Path("/opt/tritonserver/backends")
"""Where a Triton that is not told otherwise looks for them."""
START_S = 20.0

Level = Literal["ok", "WARN", "FAIL"]


@dataclass(frozen=True, slots=True)
class Finding:
    """A thing that was looked at."""

    level: Level
    subject: str
    text: str  # and, unless it is ok, what mends it

    def __str__(self) -> str:
        return f"{self.level:<4}  {self.subject}: {self.text}"


def examine(args: DoctorOptions) -> Iterator[Finding]:
    """Everything, in the order in which one thing needs another."""
    repository = Repository(args.repository)
    try:
        serving = repository.serving()
        if not serving:
            repository.open()  # raises, and says what to do
    except BundleMismatch as error:
        yield Finding("FAIL", "repository", str(error))
        return
    yield from files_of(repository)
    bundles: list[Bundle] = []
    for model, how in serving.items():
        for version in repository.versions(model):
            yield from bundle_of(repository, model, version, how, bundles)
        yield from config_of(repository, model, how)
    manifests = {f"{each.model} {each.version}": each.manifest for each in bundles}
    urls = args.triton_url
    if urls is None and _live(args.triton_grpc_port):
        urls = f"{LOOPBACK}:{args.triton_grpc_port}"
    if args.triton_url is None:
        yield from installation(manifests)
    if urls is not None:
        settings = args.settings if args.triton_url else Settings()  # one that `bertqa serve` starts has no TLS
        yield from servers(urls.split(","), settings, repository, serving, bundles)
    here = args.triton_url is None
    yield from processor(manifests, cpu_features(), here=here)
    yield from graphics(manifests, serving, here=here)
    yield from ports(args.host, args.port, args.triton_grpc_port if here else None)
    if here:
        yield shared_memory(serving, bundles)


def files_of(repository: Repository) -> Iterator[Finding]:
    """Whether the files may be read by whoever serves them, and written by whoever builds."""
    subject = f"files in {repository.root}"
    found = [path for path in repository.root.rglob("*") if path.name != ".lock"]
    for path in found:
        if not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
            yield Finding("FAIL", subject, f"{path} cannot be read; chmod -R u+rX,go+rX {repository.root}")
            return
    for path in found:
        if path.stat().st_mode & (0o005 if path.is_dir() else 0o004) != (0o005 if path.is_dir() else 0o004):
            yield Finding(
                "WARN",
                subject,
                f"{path} can be read by its owner alone, and a Triton in a container runs as somebody else; "
                f"chmod -R go+rX {repository.root}",
            )
            return
    if not os.access(repository.root, os.W_OK):
        yield Finding("WARN", subject, "can be read but not written: `bertqa models` and the builder work elsewhere")
    else:
        yield Finding("ok", subject, "can be read by all, and written")


def bundle_of(
    repository: Repository, model: str, version: int, serving: Serving, whole: list[Bundle]
) -> Iterator[Finding]:
    """Whether a bundle is as it was published; one that is loaded and opens is added to ``whole``."""
    subject = f"bundle {model} {version}"
    loaded = version in serving.loaded
    bad: Level = "FAIL" if loaded else "WARN"
    try:
        bundle = repository.open(model, version)
        json.loads((repository.directory(model, version) / QUESTIONS_FILE).read_bytes())
    except (BundleMismatch, OSError, ValueError) as error:
        yield Finding(bad, subject, str(error))
        return
    manifest = bundle.manifest
    if changed := changed_files(repository.directory(model, version), manifest):
        again = f", or `bertqa models rollback {model}`" if version == serving.active and serving.previous else ""
        mend = rebuild(manifest.target) + again
        yield Finding(bad, subject, f"{changed[0]} is not as it was published; {mend}")
        return
    role = "active" if version == serving.active else "loaded" if loaded else "not loaded"
    yield Finding("ok", subject, f"{role}, {manifest.identity}, {len(manifest.files)} files as they were published")
    yield Finding(
        "ok",
        f"tokenizer {model} {version}",
        f"{bundle.maker.vocabulary_size} tokens, of which the engine embeds {manifest.vocabulary_size}",
    )
    if loaded:
        whole.append(bundle)


def config_of(repository: Repository, model: str, serving: Serving) -> Iterator[Finding]:
    """Whether ``config.pbtxt`` is what bertqa writes, and whether it steps into none of Triton's known traps."""
    subject = f"{CONFIG_FILE} {model}"
    path = repository.root / model / CONFIG_FILE
    again = f"`bertqa models load {model} {serving.active}`"
    fix = f"never edit it: `bertqa serve` writes it again, and once Triton runs {again}"
    try:
        text = path.read_text()
        config = text_format.Parse(text, model_config_pb2.ModelConfig())
        manifests = {version: repository.manifest(model, version) for version in repository.versions(model)}
        expected = repository.config(model, serving)
    except (OSError, text_format.ParseError, BundleMismatch, ValueError, KeyError) as error:
        yield Finding("FAIL", subject, f"{path} cannot be used, {error}; {fix}")
        return
    loaded = {version: manifests[version] for version in serving.loaded}
    problems = list(traps(config, model, serving, loaded))
    for problem in problems:
        yield Finding("FAIL", subject, f"{problem}; {fix}")
    if not problems:
        if text == expected:
            yield Finding("ok", subject, f"as it was generated, version {', '.join(map(str, serving.loaded))} loaded")
        else:
            yield Finding("WARN", subject, f"not as it was generated; {fix}")


def traps(config: Any, model: str, serving: Serving, loaded: Mapping[int, Manifest]) -> Iterator[str]:
    """What in a parsed configuration would go wrong in Triton, mostly without a word.

    Args:
        config: ``ModelConfig``.
        model: name of its directory.
        serving: how the model should be served.
        loaded: manifests of the versions that should be loaded.

    Yields:
        A sentence for each, with the thread on github.com/triton-inference-server/server that it comes from.
    """
    target = loaded[serving.active].target
    if config.name != model:
        yield f"name is {config.name!r}, not that of its directory"
    if config.backend != {"cpu": "python", "tensorrt": "tensorrt"}[target]:
        yield f"backend {config.backend!r} cannot run an engine for {target}"
    most = min(manifest.max_batch_size for manifest in loaded.values())
    if config.max_batch_size < 1:
        yield (
            "max_batch_size is 0, so there is no dynamic batcher: limits and timeouts of the queue are ignored, and "
            "older Tritons find no CUDA graph (#6920, #7150)"
        )
    elif target == "tensorrt" and config.max_batch_size > most:
        yield f"max_batch_size is {config.max_batch_size}, and the engine takes {most}: larger batches fail"
    for tensors, names, data_type in (
        (config.input, INPUT_NAMES, model_config_pb2.TYPE_INT32),
        (config.output, OUTPUT_NAMES, model_config_pb2.TYPE_FP32),
    ):
        if [tensor.name for tensor in tensors] != list(names) or {each.data_type for each in tensors} != {data_type}:
            yield f"tensors must be {', '.join(names)} of {model_config_pb2.DataType.Name(data_type)}"
        if any(list(tensor.dims) != [-1] for tensor in tensors):
            yield "dims must be [ -1 ]: the batch is not among them, or batching does not work (#5721)"
    if not config.HasField("dynamic_batching"):
        yield "dynamic_batching is not set: limits and timeouts of the queue are ignored (#6920)"
    engines = sum(group.count * max(1, len(group.gpus)) for group in config.instance_group)
    if config.dynamic_batching.HasField("default_queue_policy"):
        policy = config.dynamic_batching.default_queue_policy
        if engines == 1:
            yield "default_queue_policy with a single instance stalls one request in a hundred (measured on 2.51)"
        if policy.timeout_action != model_config_pb2.ModelQueuePolicy.REJECT or not policy.allow_timeout_override:
            yield "default_queue_policy must reject, and allow_timeout_override: late requests are computed (#7512)"
        if not policy.default_timeout_microseconds:
            yield "default_timeout_microseconds is not set: who names no timeout waits without end (#6920)"
        if not policy.max_queue_size:
            yield "max_queue_size is not set: the queue grows without end (#6920)"
    elif engines > 1:
        yield "default_queue_policy is not set: the queue grows without end (#6920)"
    kind = {"cpu": "KIND_CPU", "tensorrt": "KIND_GPU"}[target]
    kinds = {model_config_pb2.ModelInstanceGroup.Kind.Name(group.kind) for group in config.instance_group}
    if kinds != {kind}:
        yield f"instance_group must be {kind}, or Triton chooses, and fails or falls back silently (#7628, #5863)"
    profiles = {tuple(group.profile) for group in config.instance_group}
    buckets = set.intersection(*(set(manifest.buckets) for manifest in loaded.values()))
    if target == "tensorrt" and profiles != {tuple(map(str, range(len(buckets))))}:
        yield "instance_group must name the profile of every bucket, or Triton uses the first alone"
    cuda = config.optimization.cuda
    if target == "tensorrt" and not cuda.graphs:
        yield "optimization.cuda.graphs is not set: every kernel of every call is launched by itself"
    if target == "tensorrt" and cuda.graph_spec:
        yield "graph_spec is tried with the profile of every length, and fails with all others than its own"
    warmed = {dim for warmup in config.model_warmup for tensor in warmup.inputs.values() for dim in tensor.dims}
    if missing := sorted(buckets - warmed):
        yield f"model_warmup has no request of {missing[0]} tokens: the first one takes seconds (#3473, #7006)"
    if tuple(config.version_policy.specific.versions) != serving.loaded:
        yield f"version_policy must name version {', '.join(map(str, serving.loaded))}, as serving.json does"
    for version, manifest in loaded.items():
        if config.parameters[f"identity_{version}"].string_value != manifest.identity:
            yield f"parameters must have identity_{version} {manifest.identity}: the service would refuse the engine"


def installation(manifests: Mapping[str, Manifest]) -> Iterator[Finding]:
    """Whether a Triton is installed that runs on this machine, and under which the engines run."""
    with tempfile.TemporaryDirectory(prefix="bertqa-doctor-") as directory:
        try:
            found = find_triton(Path(directory))
            version = triton_version(found, Path(directory))
        except TritonError as error:
            yield Finding("FAIL", "Triton", str(error))
            return
        engines = [name for name, manifest in manifests.items() if manifest.target == "tensorrt"]
        if engines and not ((found.backends or BACKENDS) / "tensorrt").is_dir():
            yield Finding(
                "FAIL",
                "Triton",
                f"{found.binary} has no backend for TensorRT, which {engines[0]} needs; use the one of NVIDIA's image, "
                "or build with --target cpu",
            )
            return
    yield from _in_range("Triton", version, str(found.binary), manifests)


def triton_version(found: TritonInstallation, directory: Path) -> str:
    """Start a server without a model, and read its version.

    Raises:
        TritonError: it does not run on this machine.
    """
    (directory / "empty").mkdir()
    command = [str(found.binary), f"--model-repository={directory / 'empty'}"]
    command += ["--allow-grpc=false", "--allow-metrics=false", f"--http-address={LOOPBACK}"]
    command.append(f"--http-port={free_port(LOOPBACK, 0)}")
    if found.backends:
        command.append(f"--backend-directory={found.backends}")
    process = subprocess.Popen(
        command, env={**os.environ, **found.environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines: list[str] = []
    try:
        assert process.stdout
        for line in process.stdout:
            if told := re.search(r"server_version\s*\|\s*([\d.]+)", line):
                return told[1]
            lines.append(line.strip())
    finally:
        process.kill()
        process.communicate()
    raise TritonError(f"{found.binary} does not run on this machine: {lines[-1] if lines else 'it says nothing'}")


def servers(
    urls: Sequence[str],
    settings: Settings,
    repository: Repository,
    serving: Mapping[str, Serving],
    bundles: Iterable[Bundle],
) -> Iterator[Finding]:
    """Whether each running Triton is of a fitting version, has loaded what it should, and answers rightly."""
    manifests = {f"{each.model} {each.version}": each.manifest for each in bundles}
    try:
        running = Servers([url.strip() for url in urls], tls_of(settings))
    except RolloutFailed as error:
        yield Finding("FAIL", "Triton", str(error))
        return
    try:
        for url, version in running.versions().items():
            yield from _in_range(f"Triton at {url}", version, "running", manifests)
        states = running.all_states()
        for bundle in bundles:
            questions = json.loads((repository.directory(bundle.model, bundle.version) / QUESTIONS_FILE).read_bytes())
            for url in running.urls:
                subject = f"{bundle.model} {bundle.version} in Triton at {url}"
                state = states[url].get((bundle.model, bundle.version))
                if state is None or state.name != "READY":
                    told = f"is {state.name.lower()}, {state.reason or 'no reason given'}" if state else "is not known"
                    yield Finding("FAIL", subject, f"{told}; have it poll {repository.root}, see its log")
                    continue
                seconds = asyncio.run(ask(running, url, bundle, questions))
                yield Finding("ok", subject, f"answers {len(seconds)} questions as when it was built")
    except RolloutFailed as error:
        yield Finding("FAIL", "Triton", str(error))
    finally:
        running.close()


def _in_range(subject: str, version: str, where: str, manifests: Mapping[str, Manifest]) -> Iterator[Finding]:
    for name, manifest in manifests.items():
        lowest, highest = manifest.triton
        if (lowest and _numbers(version) < _numbers(lowest)) or (highest and _numbers(version) > _numbers(highest)):
            wanted = f"from {lowest or 'any'} to {highest or 'any'}"
            yield Finding(
                "FAIL", subject, f"{where} is {version}, and {name} runs under {wanted}; install one of those"
            )
            return
    yield Finding("ok", subject, f"{where}, {version}")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def processor(manifests: Mapping[str, Manifest], features: Sequence[str], *, here: bool) -> Iterator[Finding]:
    """Whether this CPU can do what the engines were built for.

    Args:
        manifests: of the loaded versions, by name.
        features: of this CPU, as `cpu_features` names them.
        here: Triton runs on this machine.
    """
    engines = {name: manifest for name, manifest in manifests.items() if manifest.target == "cpu"}
    if not engines:
        yield Finding("ok", "CPU", "runs no engine")
        return
    if not here:
        yield Finding("ok", "CPU", "not looked at, for Triton runs elsewhere; run the doctor there too")
        return
    for name, manifest in engines.items():
        lost = [feature for feature in manifest.cpu_features if feature not in features]
        if manifest.precision == "bf16" and not set(BF16) & {*features}:
            yield Finding(
                "FAIL",
                "CPU",
                f"has no bf16 instructions, and {name} was built for them: it computes in float32 instead, several "
                "times as slow; build it again on this machine",
            )
        elif manifest.precision == "int8" and set(INT8) & {*lost} and not set(INT8) & {*features}:
            yield Finding(
                "FAIL",
                "CPU",
                f"adds int8 products up in 16 bits, and {name} was quantized for 32: its answers change; build it "
                "again on this machine",
            )
        elif lost:
            yield Finding(
                "WARN",
                "CPU",
                f"lacks {', '.join(lost)}, which {name} was built and measured with: it is slower here; build it again "
                "on this machine",
            )
        else:
            yield Finding(
                "ok", "CPU", f"has what {name} was built with: {', '.join(manifest.cpu_features) or 'x86-64'}"
            )


def graphics(manifests: Mapping[str, Manifest], serving: Mapping[str, Serving], *, here: bool) -> Iterator[Finding]:
    """Whether GPU, driver and TensorRT are those that the engines were built for."""
    engines = {name: manifest for name, manifest in manifests.items() if manifest.target == "tensorrt"}
    if not engines:
        yield Finding("ok", "GPU", "not needed")
        return
    if not here:
        yield Finding("ok", "GPU", "not looked at, for Triton runs elsewhere; run the doctor there too")
        return
    devices = _devices()
    if not devices:
        yield Finding(
            "FAIL",
            "GPU",
            f"nvidia-smi finds none, and {next(iter(engines))} needs one; install NVIDIA's driver (and its container "
            "toolkit), or build with --target cpu",
        )
        return
    for name, manifest in engines.items():
        built = manifest.runtime
        wanted = serving[name.split()[0]].gpus or range(len(devices))
        if missing := [number for number in wanted if number >= len(devices)]:
            yield Finding(
                "FAIL",
                "GPU",
                f"{name} is configured for GPU {missing[0]}, and there are {len(devices)}; build it with other --gpus",
            )
        for device in (devices[number] for number in wanted if number < len(devices)):
            capability = built.get("compute_capability", "")
            anywhere = "hardware_compatible" in built and _numbers(device.capability) >= AMPERE
            if device.capability != capability and not anywhere:
                yield Finding(
                    "FAIL",
                    "GPU",
                    f"{device.name} has compute capability {device.capability}, and {name} was built for {capability} "
                    f"({built.get('gpu', 'another GPU')}); build it again on this machine",
                )
            elif device.name != built.get("gpu") and not anywhere:
                yield Finding(
                    "WARN",
                    "GPU",
                    f"{device.name} is another model than {built.get('gpu', 'the one')}, which {name} was built on: it "
                    "may be slow there or fail; build it again on this machine, or with --hardware-compatible",
                )
            else:
                yield Finding("ok", "GPU", f"{device.name}, compute capability {device.capability}, as {name} needs")
            if _numbers(device.driver) < _numbers(built.get("driver", "0")):
                yield Finding(
                    "WARN", "driver", f"{device.driver} is older than {built['driver']}, which {name} was built under"
                )
        yield _tensorrt(name, built)


@dataclass(frozen=True, slots=True)
class _Device:
    name: str
    driver: str
    capability: str


def _devices() -> list[_Device]:
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=START_S, check=False)
    if done.returncode:
        return []
    return [_Device(*map(str.strip, line.split(","))) for line in done.stdout.splitlines()]


def _tensorrt(name: str, runtime: Mapping[str, str]) -> Finding:
    found, built = None, runtime.get("tensorrt", "")
    for library in ("libnvinfer.so.11", "libnvinfer.so.10", "libnvinfer.so"):
        try:
            number = int(ctypes.CDLL(library).getInferLibVersion())
        except (OSError, AttributeError):
            continue
        # 100201 is 10.2.1; before version 10 it was 8601 for 8.6.1
        major = 10_000 if number >= 100_000 else 1_000
        found = (number // major, number % major // 100, number % 100)
        break
    if found is None:
        return Finding(
            "WARN",
            "TensorRT",
            f"no libnvinfer here to tell its version; {name} needs {built}: run the doctor in Triton's image",
        )
    later = found[0] == _numbers(built)[0] and found > _numbers(built)
    if found != _numbers(built) and not (later and "version_compatible" in runtime):
        return Finding(
            "FAIL",
            "TensorRT",
            f"is {'.'.join(map(str, found))}, and {name} was built with {built}; build it again with the builder of "
            "the same release as Triton",
        )
    flag = ", and --backend-config=tensorrt,version-compatible=true" if "version_compatible" in runtime else ""
    return Finding("ok", "TensorRT", f"{'.'.join(map(str, found))}, as {name} needs{flag}")


def ports(host: str, port: int, grpc_port: int | None) -> Iterator[Finding]:
    """Whether the ports are free, or taken by a service of ours.

    Args:
        host: that the service would listen on.
        port: of the service.
        grpc_port: of a Triton that would be started, None if none would be.
    """
    wanted = [(host, port, "the service", "/health/live")]
    if grpc_port is not None:
        wanted += [
            (LOOPBACK, grpc_port, "Triton's gRPC", ""),
            (LOOPBACK, TritonPorts.metrics, "Triton's metrics", "/metrics"),
            (LOOPBACK, TritonPorts.http, "Triton's HTTP", "/v2/health/live"),
        ]
    for address, number, whose, path in wanted:
        subject = f"port {number}"
        try:
            found = free_port(address, number)
        except PortError as error:
            yield Finding("FAIL", subject, str(error))
            continue
        if number in (0, found):  # 0 takes any
            yield Finding("ok", subject, f"free for {whose}")
        elif (path and _answers(address, number, path)) or (not path and _live(number)):
            yield Finding("ok", subject, f"{whose} is running")
        else:
            yield Finding(
                "WARN",
                subject,
                f"taken by something else; `bertqa serve` would use {found} for {whose}, a container would not start",
            )


def _answers(host: str, port: int, path: str) -> bool:
    connection = http.client.HTTPConnection({"0.0.0.0": LOOPBACK, "::": "::1"}.get(host, host), port, timeout=2)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
        return response.status == 200 and (path != "/metrics" or b"nv_" in body)
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _live(grpc_port: int) -> bool:
    servers = Servers([f"{LOOPBACK}:{grpc_port}"])
    try:
        return bool(servers.versions())
    except RolloutFailed:
        return False
    finally:
        servers.close()


def shared_memory(serving: Mapping[str, Serving], bundles: Iterable[Bundle]) -> Finding:
    """Whether windows and logits have room on their way between Triton and the engines."""
    engines = sum(serving[each.model].instances for each in bundles if each.manifest.target == "cpu")
    if not engines:
        return Finding("ok", "shared memory", "not needed")
    status = os.statvfs(SHARED_MEMORY)
    free, needed = status.f_bavail * status.f_frsize, engines * SHARED_MEMORY_OF_AN_ENGINE
    told = f"{free / 2**20:.0f} MiB free in {SHARED_MEMORY}, {engines} engines need {needed / 2**20:.0f}"
    if free < needed:
        return Finding("FAIL", "shared memory", f"{told}; start the container with --shm-size 256m")
    return Finding("ok", "shared memory", told)
