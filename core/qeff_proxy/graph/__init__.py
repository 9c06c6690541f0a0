"""What is read from any ONNX graph: where a node came from, what is constant in it."""
