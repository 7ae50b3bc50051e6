"""Quantized and pruned weights: what each weight becomes, and the passes that put it in place."""
