"""Inspection: record what the passes do to a program, find identical layers, plan a compilation, check a machine."""
