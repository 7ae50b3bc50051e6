"""Engines: tokens in, logits out. One folder per engine."""
