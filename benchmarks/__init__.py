"""Benchmarks against today's methods and code, installed as ``sfm_fast.benchmarks``; run them with `sfm-fast bench`."""
