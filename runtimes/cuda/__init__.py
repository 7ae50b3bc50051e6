"""CUDA's driver, called without torch. Importing this package loads no library."""
