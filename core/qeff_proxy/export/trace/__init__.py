"""Trace a part to an ONNX graph."""
