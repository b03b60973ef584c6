"""The accuracy of distilled images: `python -m benchmarks.accuracy` makes the table."""
