"""A graph of ONNX Runtime's own operators."""
