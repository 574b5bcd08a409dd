"""Build a checkpoint into a measured engine in a Triton model repository, without torch or transformers."""

import sys

# OpenVINO and NNCF send telemetry by default, so turn it off here. openvino_model.py repeats this, because Triton runs
# it without this package.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
