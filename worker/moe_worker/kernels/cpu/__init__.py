"""CPU kernels in C++ behind a C interface; the variant is selected by the instruction sets of this CPU.

native/ holds the sources, build.py compiles them, library.py loads them, structs.py has their structs,
weights.py packs matrices in their layout, operations.py offers each operation for torch tensors.
"""
