"""Convert a model to ONNX and compare the result with its source."""
