"""Optimized to cached: keys and values between calls, and logits of the tokens that are asked for."""
