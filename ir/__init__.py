"""What passes read and write: programs, weights, stages."""
