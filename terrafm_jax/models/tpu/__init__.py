"""Attention and fusion as Pallas kernels for TPU; by test each equals its implementation in ``models``."""
