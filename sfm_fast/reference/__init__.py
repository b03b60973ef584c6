"""Every operation of the package in plain torch: its definition, which the kernels are tested against."""
