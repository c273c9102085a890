"""Triton kernels of the GPU path; the plain torch reference of each is in references.py."""
