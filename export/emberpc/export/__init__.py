"""Offline export: convert encoders to bundles. Many modules load torch or ONNX Runtime: import them where needed."""

# The first import: it sets how the threads of OpenMP wait, which torch reads when it is loaded.
import emberpc.export.threads  # noqa: F401
