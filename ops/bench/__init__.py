"""Benchmarks: each prints its number beside the limit of the machine and what the peers reach."""
