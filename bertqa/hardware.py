"""What the machine's processor, or a GPU, can do, as far as an engine's speed or exactness hangs on it."""

import platform
import re
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
INT8 = ("avx512_vnni", "avx_vnni", "amx_int8", "i8mm", "asimddp")
"""Sets that add int8 products up in 32 bits; older x86 saturates at 16."""
BF16 = ("avx512_bf16", "amx_bf16", "bf16")
"""Sets that multiply bf16."""
AMPERE = (8, 0)
"""Lowest compute capability of a GPU that an engine for several models of GPU is built on, and runs on."""
_OTHERS = ("avx2", "avx512f")


def cpu_features(cpuinfo: Path = CPUINFO) -> tuple[str, ...]:
    """Instruction sets of this CPU that CPU engines use, as Linux names them; empty where it does not tell."""
    try:
        words = set(cpuinfo.read_text().split())
    except OSError:
        return ()
    return tuple(name for name in (*_OTHERS, *BF16, *INT8) if name in words)


def cpu_name(cpuinfo: Path = CPUINFO) -> str:
    """The processor's name as Linux gives it, for reports."""
    try:
        names = re.findall(r"^model name\s*: (.*)$", cpuinfo.read_text(), re.MULTILINE)
    except OSError:
        names = []
    return str(names[0]) if names else platform.processor()
