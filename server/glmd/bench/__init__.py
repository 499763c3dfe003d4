"""Measurements, against mlx-lm and of what features cost. See docs/benchmarks.md."""
