"""Offline export: convert encoders to bundles, and fine-tune them.

Many modules of this package load torch or ONNX Runtime, which takes seconds: import such a module in the function that
uses it.
"""

# `threads` sets environment variables so that waiting threads of OpenMP sleep. It is imported before any module that
# loads torch, since torch reads the variables when it is loaded.
import emberpc.export.threads  # noqa: F401
