"""Trace one part to an ONNX graph."""
