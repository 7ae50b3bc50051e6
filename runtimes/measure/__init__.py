"""Measurements of an artifact: speed, perplexity, divergence, the self-check."""
