"""Timings against peers and floors; results are JSON lines under `results/`."""
