"""What is done to a program, one topic a file."""
