"""Loads the CPU kernels and runs operations on a pool of threads."""

import ctypes
import os
import weakref
from ctypes import Structure, byref, c_int32, c_int64, c_void_p
from functools import cache

from moe_worker.errors import SettingsError
from moe_worker.kernels.cpu import build
from moe_worker.kernels.cpu.structs import OPERATIONS

_INDEX = {arguments: index for index, arguments in enumerate(OPERATIONS)}


@cache
def load() -> ctypes.CDLL:
    """The compiled kernels, loaded once per process. Raises build.BuildError if they are not available."""
    path = build.find_or_build()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise build.BuildError(f"the CPU kernels could not be loaded: {error}") from error
    library.moe_variant_name.restype = ctypes.c_char_p
    library.moe_open.restype = c_void_p
    library.moe_close.argtypes = [c_void_p]
    library.moe_run.argtypes = [c_void_p, c_int32, c_void_p]
    library.moe_packed_bytes.restype = library.moe_argument_bytes.restype = c_int64
    library.moe_pack.argtypes = [c_void_p] * 5 + [c_int32] * 4
    library.moe_pack_sparse14.argtypes = [c_void_p] * 4 + [c_int32] * 4
    return library


@cache
def supported_variants() -> tuple[str, ...]:
    """Variants that this CPU can run, the fastest last. Raises build.BuildError."""
    library = load()
    bits = library.moe_supported()
    return tuple(
        library.moe_variant_name(index).decode() for index in range(len(build.VARIANTS)) if bits >> index & 1
    )


class Kernels:
    """A variant with its own threads; one operation runs at a time.

    Threads do not survive a fork: a child process creates its own Kernels.
    """

    def __init__(self, variant: str | None = None, threads: int = 1) -> None:
        """`variant`: one of supported_variants(), by default the fastest.

        Raises build.BuildError without kernels, SettingsError for a variant that this CPU cannot run.
        """
        variants = supported_variants()
        self.variant = variant or (variants[-1] if variants else "avx2")
        if self.variant not in variants:
            can = ", ".join(variants) or "none"
            raise SettingsError(f"this CPU cannot run the kernels for {self.variant}; it can run: {can}")
        library = load()
        self._engine = library.moe_open(list(build.VARIANTS).index(self.variant), threads)
        if not self._engine:
            raise SettingsError(f"{threads} threads for the CPU kernels could not be started")
        self._run = library.moe_run
        weakref.finalize(self, library.moe_close, self._engine)

    def run(self, arguments: Structure) -> None:
        """Runs the operation of `arguments` (one of structs.OPERATIONS). Raises MemoryError."""
        if status := self._run(self._engine, _INDEX[type(arguments)], byref(arguments)):
            raise MemoryError(os.strerror(status))
