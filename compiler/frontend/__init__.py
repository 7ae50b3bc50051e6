"""Find a model, read its checkpoint's headers, and capture it as a program."""
