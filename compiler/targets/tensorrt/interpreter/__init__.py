"""A numpy interpreter of TensorRT networks, for tests: it evaluates them layer by layer without a GPU."""
