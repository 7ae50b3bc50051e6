"""The version of llmc."""

__version__ = "0.2.0"
