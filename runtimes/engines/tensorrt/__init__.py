"""The engine for target "trt": TensorRT."""

TARGET = "trt"
