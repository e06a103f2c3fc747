"""Offline export: convert encoders to bundles, and fine-tune them.

Many modules of this package load torch or ONNX Runtime, which takes seconds: import such a module in the function that
uses it.
"""

import os
import sys

# ONNX Runtime 1.32 keeps an id of this host in the home directory and sends usage events to its makers. It reads the
# variable when it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# `threads` sets environment variables so that waiting threads of OpenMP sleep. It is imported before any module that
# loads torch, since torch reads the variables when it is loaded.
import emberpc.export.threads  # noqa: F401

# OpenVINO and NNCF send usage events through this package. Without the package, they send nothing.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
