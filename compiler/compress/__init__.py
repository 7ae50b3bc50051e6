"""Quantization, pruning and the calibration that both need."""
