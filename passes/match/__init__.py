"""Captured to canonical: every spelling of an operation becomes the one op that means it."""
