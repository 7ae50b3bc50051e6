"""Programs as ONNX: one lowering, two tables of what each op becomes."""
