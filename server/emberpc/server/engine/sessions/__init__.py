"""Run ONNX files: one contract, and one module for each library.

`import openvino` sends a usage event to its makers, through the package `openvino_telemetry`. Here that package cannot
be imported, and OpenVINO then sends nothing.
"""

import sys

sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
