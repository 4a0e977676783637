"""Benchmarks: what tables, databases, searches, repair and GPUs are worth, and what they cost."""
