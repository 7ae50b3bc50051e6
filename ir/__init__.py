"""The intermediate representation that passes change: programs, weights, stages."""
