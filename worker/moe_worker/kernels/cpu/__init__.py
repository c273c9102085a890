"""CPU kernels in C++ behind a C interface; the variant is chosen by what this CPU can do.

native/ holds the sources, build.py compiles them, library.py loads them, operations.py gives each
operation to torch tensors.
"""
