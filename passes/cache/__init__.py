"""Passes from optimized to cached programs: KV caches and selected logits."""
