"""Rounding with the help of text: which numbers matter, measured on what flows through the model."""
