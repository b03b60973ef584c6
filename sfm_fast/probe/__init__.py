"""Evaluation: features of views computed once, linear probes, and the real-image references."""
