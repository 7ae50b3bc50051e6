"""The gate: an artifact is compared with its model before it may exist."""
