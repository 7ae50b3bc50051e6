"""Targets: from a cached program to the files of one runtime. One folder per target."""
