"""How often the gates are wrong: `python -m benchmarks.gates` (all parts), or one part by name."""
