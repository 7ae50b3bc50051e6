"""Target "trt": TensorRT engines."""
