"""Detect the CPU and GPU features that decide an engine's speed or accuracy."""

import platform
import re
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
INT8 = ("avx512_vnni", "avx_vnni", "amx_int8", "i8mm", "asimddp")
"""Instruction sets that accumulate int8 products in 32 bits; older x86 CPUs saturate at 16 bits."""
BF16 = ("avx512_bf16", "amx_bf16", "bf16")
"""Instruction sets that multiply bf16."""
AMPERE = (8, 0)
"""Lowest compute capability that can build and run a hardware-compatible engine."""
_OTHERS = ("avx2", "avx512f")


def cpu_features(cpuinfo: Path = CPUINFO) -> tuple[str, ...]:
    """Return this CPU's instruction sets that CPU engines use, by their Linux names; empty if Linux lists none."""
    try:
        words = set(cpuinfo.read_text().split())
    except OSError:
        return ()
    return tuple(name for name in (*_OTHERS, *BF16, *INT8) if name in words)


def cpu_name(cpuinfo: Path = CPUINFO) -> str:
    """Return the CPU's name as Linux reports it."""
    try:
        names = re.findall(r"^model name\s*: (.*)$", cpuinfo.read_text(), re.MULTILINE)
    except OSError:
        names = []
    return str(names[0]) if names else platform.processor()
