"""What runs an artifact, without the compiler that made it."""
