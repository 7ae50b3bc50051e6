"""Seeing a program: what the passes did to it, which of its layers are the same, and a page that shows both."""
