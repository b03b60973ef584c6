"""Fixtures of a performance gate for pytest."""
