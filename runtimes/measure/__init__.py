"""Measurements of an artifact: speed, perplexity, divergence, self-check."""
