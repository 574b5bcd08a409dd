"""Check that this CPU has the instruction sets that the engines were built for."""

from collections.abc import Iterator, Mapping, Sequence

from bertqa.hardware import BF16, INT8
from bertqa.manifest import Manifest
from service.commands.doctor.finding import Finding

_FIX = "build it again on this machine"


def check_cpu(manifests: Mapping[str, Manifest], features: Sequence[str], *, is_here: bool) -> Iterator[Finding]:
    """Compare instruction sets.

    Args:
        manifests: of the loaded versions, by name.
        features: of this CPU, as `cpu_features` names them.
        is_here: whether Triton runs on this machine.
    """
    engines = {name: manifest for name, manifest in manifests.items() if manifest.served.processor == "CPU"}
    if not engines:
        yield Finding("ok", "CPU", "not used by any engine")
    elif not is_here:
        yield Finding("ok", "CPU", "not checked, because Triton runs elsewhere; run the doctor there too")
    else:
        for name, manifest in engines.items():
            yield _compare(name, manifest, features)


def _compare(name: str, manifest: Manifest, features: Sequence[str]) -> Finding:
    lost = [feature for feature in manifest.cpu_features if feature not in features]
    if manifest.precision == "bf16" and not {*BF16} & {*features}:
        return Finding(
            "FAIL",
            "CPU",
            f"has no bf16 instructions, which {name} was built for: it computes in float32 instead, several times "
            "as slow",
            _FIX,
        )
    if manifest.precision == "int8" and {*INT8} & {*lost} and not {*INT8} & {*features}:
        return Finding(
            "FAIL",
            "CPU",
            f"accumulates int8 products in 16 bits, but {name} was quantized for 32: its answers change",
            _FIX,
        )
    if lost:
        text = f"lacks {', '.join(lost)}, which {name} was built and measured with: it is slower here"
        return Finding("WARN", "CPU", text, _FIX)
    return Finding("ok", "CPU", f"has what {name} was built with: {', '.join(manifest.cpu_features) or 'x86-64'}")
