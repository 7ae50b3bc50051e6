"""Canonical to optimized: the same numbers for less work."""
