"""Test the filter that keeps shared memory private, in a real child process."""

import platform
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from service.runtime.private_memory import UMASK, private_memory


@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="no filter for this machine")
def test_a_child_and_its_children_cannot_open_files_up_to_others(tmp_path: Path) -> None:
    program = (
        "import os, subprocess, sys\n"
        "file = open(sys.argv[1], 'w'); os.fchmod(file.fileno(), 0o644)\n"
        "grandchild = 'import os, sys; os.fchmod(open(sys.argv[1], \"w\").fileno(), 0o666)'\n"
        "subprocess.run([sys.executable, '-c', grandchild, sys.argv[2]], check=True)\n"
    )
    files = [tmp_path / "child", tmp_path / "grandchild"]
    command = [sys.executable, "-c", program, *map(str, files)]
    subprocess.run(command, check=True, timeout=60, umask=UMASK, preexec_fn=private_memory())
    assert [stat.S_IMODE(file.stat().st_mode) for file in files] == [0o600, 0o600]
