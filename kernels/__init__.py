"""Triton kernels, one file per operation, installed as ``sfm_fast.kernels``."""
