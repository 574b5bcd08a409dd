"""Hide the shared memory of a child process from other users.

Triton's Python backend creates its shared memory with boost, which sets the mode to 0644 by ``fchmod``, ignores the
umask, and has no option for the mode. So the child runs with umask 077 and under a seccomp filter that makes ``fchmod``
do nothing. Its own children inherit both.
"""

import ctypes
import platform
import struct
from collections.abc import Callable

UMASK = 0o077

_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_NO_NEW_PRIVS = 38
_SET_MODE_FILTER = 1
_SPEC_ALLOW = 4  # without it, kernels before 5.16 disable speculation, which slows engines down
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06  # instructions of the kernel's BPF
_ALLOW, _SUCCEED_WITHOUT_RUNNING = 0x7FFF0000, 0x00050000  # seccomp actions; the second returns errno 0
# Architecture (AUDIT_ARCH), and its system call numbers of fchmod and seccomp.
_MACHINES = {"x86_64": (0xC000003E, 91, 317), "aarch64": (0xC00000B7, 52, 277)}


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def private_memory() -> Callable[[], None]:
    """Return a ``preexec_fn`` that installs the filter; it does nothing on other architectures."""
    known = _MACHINES.get(platform.machine())
    if known is None:
        return lambda: None
    architecture, fchmod, seccomp = known
    instructions = [
        (_LOAD, 0, 0, 4),  # the architecture
        (_JUMP_IF_EQUAL, 0, 3, architecture),
        (_LOAD, 0, 0, 0),  # the number of the system call
        (_JUMP_IF_EQUAL, 0, 1, fchmod),
        (_RETURN, 0, 0, _SUCCEED_WITHOUT_RUNNING),
        (_RETURN, 0, 0, _ALLOW),
    ]
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in instructions)
    program = _Program(len(instructions), code)

    def prepare() -> None:
        _LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)  # without it, only root may install a filter
        _LIBC.syscall(seccomp, _SET_MODE_FILTER, _SPEC_ALLOW, ctypes.byref(program))

    return prepare
