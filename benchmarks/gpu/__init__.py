"""A first run on a GPU: stages with limits, times of the kernels, whole steps, and the result files made of them."""
