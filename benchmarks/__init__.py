"""Benchmarks beside the methods and code that users have today, installed as ``sfm_fast.benchmarks``; run them with `sfm-fast bench`."""
