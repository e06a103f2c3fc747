"""Convert a model to ONNX, run the ONNX file, and compare its outputs with those of the source."""
