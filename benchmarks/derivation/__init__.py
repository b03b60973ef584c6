"""LGM's gradient beside the flow on real features: `python -m benchmarks.derivation` makes table and figure."""
