"""From a source to a captured program."""
