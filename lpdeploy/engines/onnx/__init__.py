"""A graph of standard ONNX operators."""
