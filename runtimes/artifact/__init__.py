"""The artifact on disk: the contract between the compiler and the runtimes."""
