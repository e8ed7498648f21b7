"""Adapters in memory: reading them, the pool of rank rows, and the low-rank term of a batch."""
