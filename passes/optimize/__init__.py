"""Passes from canonical to optimized programs: same results, less work."""
