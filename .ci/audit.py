"""Secrets that stand in a tracked file, and known vulnerabilities of what constraints.txt pins; fails on either.

Where the vulnerability service cannot be reached nothing is audited, and a line says so: that is no pass.
"""

import json
import subprocess
import sys
from pathlib import Path

BIN = Path(sys.executable).parent


def main() -> int:
    """Run both; returns the exit code."""
    files = subprocess.run(["git", "ls-files", "-z"], check=True, capture_output=True, text=True).stdout.split("\0")
    # Digests and ids of data sets are of high entropy too; what is a false alarm says `pragma: allowlist secret`.
    noisy = ("HexHighEntropyString", "Base64HighEntropyString")
    scan = [BIN / "detect-secrets-hook", *(f"--disable-plugin={name}" for name in noisy), *filter(None, files)]
    failed = subprocess.run(scan, check=False).returncode != 0
    print(f"secrets: {len(files) - 1} files, {'found' if failed else 'none'}", flush=True)
    audit = [BIN / "pip-audit", "--requirement=constraints.txt", "--no-deps", "--disable-pip", "--format=json"]
    done = subprocess.run(audit, check=False, capture_output=True, text=True)
    try:
        found = json.loads(done.stdout)["dependencies"]
    except ValueError:
        found = []
    audited = [each for each in found if "skip_reason" not in each]
    vulnerable = [each for each in audited if each["vulns"]]
    for each in vulnerable:
        print(f"{each['name']} {each['version']}: {', '.join(vuln['id'] for vuln in each['vulns'])}")
    if not audited:
        print("vulnerabilities: NOT AUDITED, pip-audit reaches no service that knows them from here")
    else:
        print(f"vulnerabilities: {len(audited)} of {len(found)} packages audited, {len(vulnerable)} vulnerable")
    return int(failed or bool(vulnerable))


if __name__ == "__main__":
    sys.exit(main())
