"""Helm, one call a process: its Go runtime does not live beside all that a run of the tests has loaded.

``python tests/support/helm_process.py render|lint CHART`` takes values as JSON and gives JSON, or Helm's error as text
and status 1.
"""

import json
import sys

import helm_python

call, path = sys.argv[1:]
values = json.load(sys.stdin)
try:
    if call == "lint":
        found = helm_python.lint(path, values, strict=True)
    else:
        with helm_python.Chart.load(path) as chart:
            found = chart.render(values, name="qa", namespace="answers")
except helm_python.HelmError as error:
    sys.exit(str(error))
json.dump(found, sys.stdout)
