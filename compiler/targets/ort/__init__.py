"""Target "ort": ONNX Runtime on CPUs."""
