"""ONNX Runtime on a CPU, the default backend: start with ``backend.py``."""
