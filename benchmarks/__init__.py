"""Benchmarks of the operators on a GPU, one file per operator, and what their kernels compile to without one."""
