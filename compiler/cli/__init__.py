"""The `llmc` command: one file a verb."""
