"""Numerical kernels that know nothing of training: polar factors, decompositions, small solvers."""
