"""The engine for target "ort": ONNX Runtime."""

TARGET = "ort"
