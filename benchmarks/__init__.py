"""Benchmarks of the operators on a GPU and on one core of a CPU, of whole edits, and of what kernels compile to."""
