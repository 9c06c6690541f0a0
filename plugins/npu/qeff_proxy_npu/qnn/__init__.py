"""Qualcomm HTP through ONNX Runtime, in its emulator where there is no NPU."""
