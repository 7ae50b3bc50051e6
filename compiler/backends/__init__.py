"""From a program to what a target runs."""
