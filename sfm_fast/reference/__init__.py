"""Every operation of the package in plain torch: the definition, in code, and what the kernels are tested against."""
