"""Run all checks in order."""

from collections.abc import Iterator

from bertqa.hardware import cpu_features
from bertqa.manifest import Bundle, BundleMismatch
from bertqa.repository import Repository
from service.commands.doctor import DoctorOptions
from service.commands.doctor.configuration import check_configuration
from service.commands.doctor.cpu import check_cpu
from service.commands.doctor.files import check_files
from service.commands.doctor.finding import Finding
from service.commands.doctor.gpu import check_gpus
from service.commands.doctor.ports import check_ports
from service.commands.doctor.running_triton import check_running_triton, is_triton_at
from service.commands.doctor.shared_memory import check_shared_memory
from service.commands.doctor.triton_installation import check_triton_installation
from service.commands.doctor.versions import check_version
from service.runtime.ports import LOOPBACK
from service.settings import Settings


def diagnose(options: DoctorOptions) -> Iterator[Finding]:
    """Run all checks, in the order of their dependencies."""
    repository = Repository(options.repository)
    try:
        serving = repository.serving()
        if not serving:
            repository.open()  # raises an error that says what to do
    except BundleMismatch as error:
        yield Finding("FAIL", "repository", str(error))
        return
    yield from check_files(repository)
    loaded: list[Bundle] = []
    for model, how in serving.items():
        for version in repository.versions(model):
            finding, bundle = check_version(repository, model, version, how)
            yield finding
            if bundle is None:
                continue
            vocabulary = f"{bundle.tokenizer.vocabulary_size} tokens"
            embedded = f"{bundle.manifest.vocabulary_size} embeddings in the engine"
            yield Finding("ok", f"tokenizer {model} {version}", f"{vocabulary}, {embedded}")
            if version in how.loaded:
                loaded.append(bundle)
        yield from check_configuration(repository, model, how)
    manifests = {f"{each.model} {each.version}": each.manifest for each in loaded}
    is_here = options.triton_url is None
    urls = options.triton_url
    if is_here:
        yield from check_triton_installation(manifests)
        if is_triton_at(options.triton_grpc_port):
            urls = f"{LOOPBACK}:{options.triton_grpc_port}"
    if urls is not None:
        settings = Settings() if is_here else options.settings  # the Triton of `bertqa serve` has no TLS
        yield from check_running_triton(urls.split(","), settings, repository, loaded)
    yield from check_cpu(manifests, cpu_features(), is_here=is_here)
    yield from check_gpus(manifests, serving, is_here=is_here)
    yield from check_ports(options.host, options.port, options.triton_grpc_port if is_here else None)
    if is_here:
        yield check_shared_memory(serving, loaded)
