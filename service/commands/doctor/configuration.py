"""Check that ``config.pbtxt`` is as bertqa writes it, and explain what each difference causes in Triton."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from google.protobuf import json_format

from bertqa.manifest import BundleMismatch
from bertqa.repository import CONFIG_FILE, Repository
from bertqa.triton_config import MalformedConfig, Serving
from service.commands.doctor.finding import Finding

HARMLESS = "no known problem, but bertqa overwrites it when it writes the file again"
_SHOWN = 80  # characters of a value


@dataclass(frozen=True, slots=True)
class Difference:
    """A field that differs from what bertqa writes; None means not set."""

    field: str  # such as `instance_group[0].kind`
    found: Any
    expected: Any

    def __str__(self) -> str:
        return f"{self.field} is {_shown(self.found)}, bertqa writes {_shown(self.expected)}"


_MEANINGS = (
    (r"name", "it must be the name of the model directory"),
    (r"backend|platform|default_model_filename", "another backend cannot run the engine"),
    (r"(input|output)\[\d+\]\.dims", "the dims must not include the batch, or batching does not work (#5721)"),
    (r"(input|output)\b.*", "the service sends and reads exactly these tensors"),
    (r"version_policy.*", "Triton would load other versions than those in serving.json"),
    (r"instance_group\[\d+\]\.profile", "Triton uses only the first profile, for every length"),
    (r"instance_group(\[\d+\]\.kind)?", "Triton chooses the device, and fails or falls back silently (#7628, #5863)"),
    (r"optimization.*\.graph_spec", "Triton tries it with the profile of every length, and fails for all but one"),
    (r"optimization.*", "every kernel of every call is launched separately"),
    (r"model_warmup.*", "the first request of a length takes seconds (#3473, #7006)"),
    (
        r"dynamic_batching\.default_queue_policy\.(timeout_action|allow_timeout_override)",
        "late requests are still computed (#7512)",
    ),
)
"""Fields where every change is harmful, and the effect; numbers are issues of triton-inference-server on GitHub."""
_MEANINGS_UNSET = (
    (r"max_batch_size", "no dynamic batcher, so queue limits and timeouts are ignored (#6920, #7150)"),
    (r"dynamic_batching", "queue limits and timeouts are ignored (#6920)"),
    (r"dynamic_batching\.default_queue_policy(\.max_queue_size)?", "the queue grows without limit (#6920)"),
    (r".*\.default_timeout_microseconds", "a request without a timeout waits forever (#6920)"),
)
"""Fields that are harmful if not set."""


def check_configuration(repository: Repository, model: str, serving: Serving) -> Iterator[Finding]:
    """Compare the file with what bertqa would write; yields a finding for each effect of the differences."""
    subject = f"{CONFIG_FILE} {model}"
    path = repository.root / model / CONFIG_FILE
    again = f"`bertqa models load {model} {serving.active}`"
    fix = f"do not edit it; `bertqa serve` writes it again, or with a running Triton {again}"
    try:
        found = repository.written_config(model)
        expected = repository.expected_config(model, serving)
    except (OSError, MalformedConfig, BundleMismatch, ValueError, KeyError) as error:
        yield Finding("FAIL", subject, f"{path} is invalid: {error}", fix)
        return
    explained = sorted(
        ((_meaning(each, serving) or "", each) for each in differences(found, expected)), key=lambda pair: pair[0]
    )
    for meaning, group in groupby(explained, key=lambda pair: pair[0]):
        changes = [str(difference) for _, difference in group]
        more = f" (and {len(changes) - 1} more)" if len(changes) > 1 else ""
        level, text = ("FAIL", meaning) if meaning else ("WARN", HARMLESS)
        yield Finding(level, subject, f"{changes[0]}{more}: {text}", fix)  # type: ignore[arg-type]
    if not explained:
        yield Finding("ok", subject, f"as generated, version {', '.join(map(str, serving.loaded))} loaded")


def differences(found: Any, expected: Any) -> list[Difference]:
    """Return the fields that differ between two ``ModelConfig`` messages."""
    one, other = (json_format.MessageToDict(each, preserving_proto_field_name=True) for each in (found, expected))
    return list(_differences(one, other, ""))


def _differences(found: Any, expected: Any, field: str) -> Iterator[Difference]:
    if isinstance(found, dict) and isinstance(expected, dict):
        for name in dict.fromkeys((*expected, *found)):
            yield from _differences(found.get(name), expected.get(name), f"{field}.{name}" if field else name)
    elif _are_messages(found) and _are_messages(expected) and len(found) == len(expected):
        for n, (one, other) in enumerate(zip(found, expected, strict=True)):
            yield from _differences(one, other, f"{field}[{n}]")
    elif found != expected:
        yield Difference(field, found, expected)


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, dict) for each in value)


def _meaning(difference: Difference, serving: Serving) -> str | None:
    """Return what goes wrong in Triton, mostly silently; None if nothing does."""
    field, found, expected = difference.field, difference.found, difference.expected
    if version := re.fullmatch(r"parameters\.identity_(\d+).*", field):
        is_loaded = int(version[1]) in serving.loaded
        return "the service rejects an engine with another identity" if is_loaded else None
    if field == "instance_group[0].count" and expected > 1 and found in (None, 1):
        return "a queue policy with a single instance stalls one request in a hundred (measured on 2.51)"
    if field == "dynamic_batching.default_queue_policy" and expected is None:
        return "a queue policy with a single instance stalls one request in a hundred (measured on 2.51)"
    if field == "max_batch_size" and found is not None and found > expected:
        return "the engine takes fewer windows at once, and larger batches fail"
    meanings: Sequence[tuple[str, str]] = (*_MEANINGS, *(_MEANINGS_UNSET if found is None else ()))
    return next((meaning for pattern, meaning in meanings if re.fullmatch(pattern, field)), None)


def _shown(value: Any) -> str:
    if value is None:
        return "not set"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
