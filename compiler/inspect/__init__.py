"""Inspection of models, programs and machines.

It records what passes do, finds identical layers, plans a compilation and checks a machine.
"""
