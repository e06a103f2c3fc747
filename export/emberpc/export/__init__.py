"""Offline export: convert encoders to bundles. Many modules load torch or ONNX Runtime: import them where needed."""
