"""Keep tests small: one thread is faster for tensors of this size, and leaves the other cores alone."""

import os

# Before anything imports triton: without a GPU its kernels run in the interpreter, on CPU tensors.
os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

torch.set_num_threads(1)
