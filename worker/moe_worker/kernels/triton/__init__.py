"""Triton kernels of the GPU path; plain torch beside each is in references.py."""
