"""The engine for target "ort": ONNX Runtime."""
