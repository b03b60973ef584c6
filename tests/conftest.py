"""Keep tests small: one thread is faster for tensors of this size, and leaves the other cores alone."""

import torch

torch.set_num_threads(1)
