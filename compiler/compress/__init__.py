"""Quantization, pruning and the calibration behind both."""
