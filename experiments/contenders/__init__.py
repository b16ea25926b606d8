"""Implementations that the benchmarks compare, and what running them takes."""
