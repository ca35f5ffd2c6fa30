"""Error rates of the gates: `python -m benchmarks.gates` (all parts), or one part by name."""
