"""Inference engines that run ONNX models. ONNX Runtime is the only one so far."""
