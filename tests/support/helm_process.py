"""Run one Helm call in a separate process, because its Go runtime conflicts with what the tests have loaded.

``python tests/support/helm_process.py render|lint CHART`` reads values as JSON and prints JSON, or prints Helm's error
as text and exits with 1.
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
