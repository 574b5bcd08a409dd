"""Generate, print and parse the ``config.pbtxt`` of a served model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bertqa.errors import InvalidArgument
from bertqa.manifest import Manifest
from bertqa.targets import ServedTarget
from bertqa.windows import INPUT_NAMES, OUTPUT_NAMES

MAX_QUEUE_SIZE = 256
"""Most requests that may wait in Triton's queue; Triton rejects further ones immediately."""
QUEUE_TIMEOUT_MICROSECONDS = 5_000_000
"""How long a request may wait by default; about the time that a full queue of long windows takes."""
_HEADER = "# Written by bertqa from serving.json and the manifests; changes made by hand are lost.\n"

ModelConfig = Any
"""Triton's ``ModelConfig`` (`tritonclient.grpc.model_config_pb2`), which has no types for a checker."""


class MalformedConfig(ValueError):
    """The text is not a valid ``config.pbtxt``; the message has line, column and reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """How a model is served: its versions, engine instances and devices."""

    active: int  # the version that answers
    previous: int | None = None  # the version active before, for a rollback
    loaded: tuple[int, ...]  # versions that Triton has loaded, ascending; includes the active one
    instances: int = 2  # engine instances per version (per GPU on GPUs)
    threads: int = 0  # CPU cores per instance; 0 means all
    gpus: tuple[int, ...] = ()  # GPUs that run the instances; empty means all


def model_config(model: str, manifests: Mapping[int, Manifest], serving: Serving) -> ModelConfig:
    """Build the configuration of a model for Triton.

    If only ``version_policy`` or ``instance_group`` changes, Triton keeps loaded versions as they are. Any other change
    makes it reload them, while the old ones go on answering. So the configuration lists the identity of every version
    on disk, loaded or not: unloading one then changes the policy alone.

    Args:
        model: name of the model.
        manifests: the manifest of each version in the repository.
        serving: which versions are loaded, and how.

    Raises:
        InvalidArgument: the loaded versions have different targets, or different buckets on a GPU; one model cannot
            serve both.
    """
    pb = _messages()
    loaded = [manifests[version] for version in serving.loaded]
    target = _common_target(loaded)
    lengths = sorted(set.intersection(*(set(manifest.buckets) for manifest in loaded)))  # in all versions
    max_batch_size = min(manifest.max_batch_size for manifest in loaded)
    parameters = {"threads": str(serving.threads)}
    parameters |= {f"identity_{version}": manifest.identity for version, manifest in manifests.items()}
    batch_sizes = sorted({1, max_batch_size} if target.warms_every_batch_size else {1})
    config = pb.ModelConfig(
        name=model,
        backend=target.backend,
        max_batch_size=max_batch_size,
        input=[pb.ModelInput(name=name, data_type=pb.TYPE_INT32, dims=[-1]) for name in INPUT_NAMES],
        output=[pb.ModelOutput(name=name, data_type=pb.TYPE_FP32, dims=[-1]) for name in OUTPUT_NAMES],
        version_policy=pb.ModelVersionPolicy(specific=pb.ModelVersionPolicy.Specific(versions=serving.loaded)),
        instance_group=[_instance_group(target, serving, len(lengths))],
        dynamic_batching=_batching(serving),
        parameters={name: pb.ModelParameter(string_value=value) for name, value in parameters.items()},
        model_warmup=[_warm_up(length, windows) for length in lengths for windows in batch_sizes],
    )
    if target.has_cuda_graphs:
        # Without graph_spec, Triton captures each profile's optimal length, which is a bucket, at batch size 1 and the
        # largest. It would try each graph_spec with all profiles and log an error for every profile it does not fit.
        config.optimization.cuda.graphs = True
    return config


def to_text(config: ModelConfig) -> str:
    """Print a configuration as the text of ``config.pbtxt``."""
    from google.protobuf import text_format  # noqa: PLC0415  see `_messages`

    return _HEADER + text_format.MessageToString(config, as_utf8=True, use_short_repeated_primitives=True)


def parse(text: str) -> ModelConfig:
    """Parse the text of a ``config.pbtxt``.

    Raises:
        MalformedConfig: the text is not a model configuration.
    """
    from google.protobuf import text_format  # noqa: PLC0415  see `_messages`

    try:
        return text_format.Parse(text, _messages().ModelConfig())
    except text_format.ParseError as error:
        raise MalformedConfig(str(error)) from error


def _messages() -> Any:
    """Import Triton's protobuf messages on first use, so that code that only reads manifests does not need them."""
    from tritonclient.grpc import model_config_pb2  # noqa: PLC0415

    return model_config_pb2


def _common_target(loaded: Sequence[Manifest]) -> ServedTarget:
    targets = {manifest.target for manifest in loaded}
    if len(targets) != 1:
        raise InvalidArgument(("loaded",), f"versions for {' and '.join(sorted(targets))} cannot be one model")
    buckets = {manifest.buckets for manifest in loaded}
    if loaded[0].served.has_profiles and len(buckets) != 1:  # the profiles are listed once for all versions
        raise InvalidArgument(
            ("loaded",),
            f"versions with the buckets {' and '.join(map(str, sorted(buckets)))} cannot be one model",
        )
    return loaded[0].served


def _batching(serving: Serving) -> Any:
    """Configure the batcher explicitly, because Triton otherwise ignores queue limits and timeouts.

    Triton rejects a queued request that is too late, but always finishes a running one. With a queue policy and a
    single instance, Triton 2.51 makes about 1 % of requests wait half a second or more while the instance is idle. This
    was never seen without the policy or with a second instance, so a single instance gets no policy.
    """
    pb = _messages()
    batching = pb.ModelDynamicBatching(max_queue_delay_microseconds=0)
    if serving.instances * max(1, len(serving.gpus)) > 1:
        batching.default_queue_policy.CopyFrom(
            pb.ModelQueuePolicy(
                timeout_action=pb.ModelQueuePolicy.REJECT,
                default_timeout_microseconds=QUEUE_TIMEOUT_MICROSECONDS,
                allow_timeout_override=True,
                max_queue_size=MAX_QUEUE_SIZE,
            )
        )
    return batching


def _instance_group(target: ServedTarget, serving: Serving, profiles: int) -> Any:
    """Name device and profiles explicitly: by default Triton picks the device and uses only the first profile."""
    group = _messages().ModelInstanceGroup
    return group(
        count=serving.instances,
        kind=group.Kind.Value(f"KIND_{target.processor}"),
        gpus=serving.gpus if target.processor == "GPU" else (),
        profile=map(str, range(profiles)) if target.has_profiles else (),
    )


def _warm_up(length: int, windows: int) -> Any:
    """Build a warm-up request of zeros: every vocabulary has token id 0, but random ids might not exist."""
    pb = _messages()
    zeros = pb.ModelWarmup.Input(data_type=pb.TYPE_INT32, dims=[length], zero_data=True)
    name = f"length_{length}" + (f"_windows_{windows}" if windows > 1 else "")
    return pb.ModelWarmup(name=name, batch_size=windows, inputs=dict.fromkeys(INPUT_NAMES, zeros))
