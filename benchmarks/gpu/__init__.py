"""Correctness and speed of PPO on one GPU: see docs/gpu.md and benchmarks/gpu.sh."""
