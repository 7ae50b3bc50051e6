"""What an op means and how it runs."""
