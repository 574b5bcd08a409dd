"""The ``config.pbtxt`` of a served model, as Triton's own message and as text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bertqa.errors import InvalidArgument
from bertqa.manifest import Manifest
from bertqa.targets import ServedTarget
from bertqa.windows import INPUT_NAMES, OUTPUT_NAMES

MAX_QUEUE_SIZE = 256
"""Requests that wait at most; Triton refuses the next at once."""
QUEUE_TIMEOUT_MICROSECONDS = 5_000_000
"""How long a request may wait unless it says otherwise; about the time that a full queue of long windows takes."""
_HEADER = "# Written by bertqa from serving.json and the manifests; changes made by hand are lost.\n"

ModelConfig = Any
"""Triton's ``ModelConfig`` (`tritonclient.grpc.model_config_pb2`), which has no types for a checker."""


class MalformedConfig(ValueError):
    """A text is not a ``config.pbtxt``; the message has line, column and reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """How a model is served: which of its versions, and by what."""

    active: int  # the version that answers
    previous: int | None = None  # the one that did before, for a rollback
    loaded: tuple[int, ...]  # versions that Triton holds ready, in rising order, the active one among them
    instances: int = 2  # engines of each version side by side
    threads: int = 0  # cores that each may use on a CPU; 0 is all of them
    gpus: tuple[int, ...] = ()  # devices with so many engines each; none stands for all that there are


def model_config(model: str, manifests: Mapping[int, Manifest], serving: Serving) -> ModelConfig:
    """Describe a model to Triton.

    Triton leaves a loaded version alone when nothing but ``version_policy`` and ``instance_group`` change, and builds
    it anew, beside the one that answers meanwhile, when anything else does. So every version on disk has its identity
    here, whether it is loaded or not: to unload one then changes the policy alone.

    Args:
        model: its name.
        manifests: of all versions in the repository.
        serving: which of them are loaded.

    Raises:
        InvalidArgument: the loaded versions run on different targets, or on a GPU with different buckets, and so cannot
            be one model.
    """
    pb = _messages()
    loaded = [manifests[version] for version in serving.loaded]
    target = _common_target(loaded)
    lengths = sorted(set.intersection(*(set(manifest.buckets) for manifest in loaded)))  # those that every version can
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
        # Without graph_spec Triton captures every profile's best length, which is a bucket, at batch size 1 and the
        # largest. A graph_spec it would try with all profiles, and log an error for each whose range it is outside.
        config.optimization.cuda.graphs = True
    return config


def to_text(config: ModelConfig) -> str:
    """Print a configuration as the text of ``config.pbtxt``."""
    from google.protobuf import text_format  # noqa: PLC0415  see `_messages`

    return _HEADER + text_format.MessageToString(config, as_utf8=True, use_short_repeated_primitives=True)


def parse(text: str) -> ModelConfig:
    """Read the text of a ``config.pbtxt``.

    Raises:
        MalformedConfig: it is none.
    """
    from google.protobuf import text_format  # noqa: PLC0415  see `_messages`

    try:
        return text_format.Parse(text, _messages().ModelConfig())
    except text_format.ParseError as error:
        raise MalformedConfig(str(error)) from error


def _messages() -> Any:
    """Triton's messages, imported when a configuration is written or read: who only reads manifests needs none."""
    from tritonclient.grpc import model_config_pb2  # noqa: PLC0415

    return model_config_pb2


def _common_target(loaded: Sequence[Manifest]) -> ServedTarget:
    targets = {manifest.target for manifest in loaded}
    if len(targets) != 1:
        raise InvalidArgument(("loaded",), f"versions for {' and '.join(sorted(targets))} cannot be one model")
    buckets = {manifest.buckets for manifest in loaded}
    if loaded[0].served.has_profiles and len(buckets) != 1:  # the profiles are named once for all versions
        raise InvalidArgument(
            ("loaded",),
            f"versions with the buckets {' and '.join(map(str, sorted(buckets)))} cannot be one model",
        )
    return loaded[0].served


def _batching(serving: Serving) -> Any:
    """Without an explicit batcher Triton ignores queue limits and timeouts.

    A queued request is refused once late, but one being computed always finishes. With a queue policy and a single
    instance, Triton 2.51 leaves about one request in a hundred waiting for half a second or more while the instance is
    idle; never seen without the policy, or with a second instance.
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
    """Without an explicit group Triton chooses the device, and of unnamed profiles it would use the first alone."""
    group = _messages().ModelInstanceGroup
    return group(
        count=serving.instances,
        kind=group.Kind.Value(f"KIND_{target.processor}"),
        gpus=serving.gpus if target.processor == "GPU" else (),
        profile=map(str, range(profiles)) if target.has_profiles else (),
    )


def _warm_up(length: int, windows: int) -> Any:
    """A request of zeros: token id 0 exists in every vocabulary, where random ids would not."""
    pb = _messages()
    zeros = pb.ModelWarmup.Input(data_type=pb.TYPE_INT32, dims=[length], zero_data=True)
    name = f"length_{length}" + (f"_windows_{windows}" if windows > 1 else "")
    return pb.ModelWarmup(name=name, batch_size=windows, inputs=dict.fromkeys(INPUT_NAMES, zeros))
