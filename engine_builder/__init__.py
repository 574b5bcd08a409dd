"""Checkpoint directory -> measured engine in a Triton model repository; needs neither torch nor transformers."""

import sys

# OpenVINO would report its import, and NNCF what it quantizes, to their makers; see openvino_model.py, which in Triton
# is on its own.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
