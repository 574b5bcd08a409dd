"""Test what CI relies on: the audit reports if it audited nothing, skips fail, set-ups are renewed by content."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.paths import ROOT

VULNERABLE = {"dependencies": [{"name": "left-pad", "version": "1", "vulns": [{"id": "CVE-1"}]}]}
SOUND = {"dependencies": [{"name": "left-pad", "version": "1", "vulns": []}]}
UNKNOWN = {"dependencies": [{"name": "left-pad", "skip_reason": "not reachable"}]}


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def audit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The audit, with programs of our own in place of the two that it runs."""
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "BIN", tmp_path)
    monkeypatch.delenv("ALLOW_UNAUDITED", raising=False)
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.chdir(ROOT)
    return module


@pytest.mark.parametrize(
    ("secrets", "found", "allowed", "code", "said"),
    [
        (0, SOUND, "0", 0, "\nvulnerabilities: 1 of 1 packages audited, 0 vulnerable"),
        (0, VULNERABLE, "1", 1, "left-pad 1: CVE-1"),
        (1, SOUND, "0", 1, ", found"),
        (0, UNKNOWN, "0", 3, "\n::warning::vulnerabilities: NOT AUDITED"),
        (0, None, "0", 3, "\n::warning::vulnerabilities: NOT AUDITED"),
        (0, None, "1", 0, "\n::warning::vulnerabilities: NOT AUDITED"),
        (1, None, "1", 1, ", found"),
    ],
)
def test_the_audit_passes_only_what_it_audited(
    audit: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    secrets: int,
    found: object,
    allowed: str,
    code: int,
    said: str,
) -> None:
    program(tmp_path / "detect-secrets-hook", f"exit {secrets}")
    program(tmp_path / "pip-audit", f"echo '{json.dumps(found)}'" if found else "echo 'no route to host' >&2; exit 1")
    monkeypatch.setenv("ALLOW_UNAUDITED", allowed)
    assert audit.main() == code
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("ci", "code"), [("true", 1), ("false", 0)])
def test_a_skipped_test_fails_in_ci_alone(tmp_path: Path, ci: str, code: int, workers: int) -> None:
    (tmp_path / "test_skipped.py").write_text("import pytest\ndef test_skipped():\n    pytest.skip('for no reason')\n")
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-c", str(ROOT / "pyproject.toml")]
    command += ["-p", "no:cacheprovider", f"--rootdir={ROOT}", "-n", str(workers), "--dist", "loadfile"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(
        [*command, str(tmp_path / "test_skipped.py")],
        cwd=ROOT,
        env={**environment, "CI": ci},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert ("SKIPPED, which CI does not allow" in done.stdout) == bool(code)


def test_a_set_up_is_renewed_when_contents_change_and_not_when_files_are_touched(tmp_path: Path) -> None:
    inputs = ["pyproject.toml", "constraints.txt", "training/install_horovod.sh", "tests/javascript/package-lock.json"]
    inputs += [f"tests/{path.name}" for path in (ROOT / "tests").glob("install_*.sh")]
    for name in ("Makefile", *inputs):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name in inputs:
        if name.endswith(".sh"):
            program(tmp_path / name, f"echo ran {name}")
    for name in ("python", "ruff", "mypy", "lint-imports", "npm"):
        program(tmp_path / ".venv" / "bin" / name, f"echo ran {name}")

    def make() -> set[str]:
        environment = {**os.environ, "PATH": f"{tmp_path / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run(
            ["make", "lint", "PYTHON=true"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return {line.removeprefix("ran ") for line in done.stdout.splitlines() if line.startswith("ran ")}

    everything = {"python", "npm", "ruff", "mypy", "lint-imports", *(name for name in inputs if name.endswith(".sh"))}
    assert make() == everything
    for name in inputs:
        os.utime(tmp_path / name, (time.time() + 9, time.time() + 9))  # as a checkout does
    assert make() == {"ruff", "mypy", "lint-imports"}
    with (tmp_path / "tests" / "install_browser.sh").open("a") as script:
        script.write("# another browser\n")
    assert make() == everything - {"training/install_horovod.sh"}
    with (tmp_path / "constraints.txt").open("a") as constraints:
        constraints.write("# another pin\n")
    assert make() == everything
