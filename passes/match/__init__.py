"""Passes from captured to canonical: each spelling becomes one op."""
