"""Compiles the kernels of passes side by side before they are launched, and counts what was compiled.

Launched one after the other on an empty cache, the kernels of a model take Triton a minute: most of it in
LLVM and in ptxas, which leave the interpreter's lock to other threads.
"""

import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import triton
from torch.overrides import TorchFunctionMode
from triton import knobs
from triton.runtime.jit import JITFunction

log = logging.getLogger(__name__)
# Each compilation takes some 100 MB of memory.
MOST_THREADS = 8
_AHEAD: ContextVar[bool] = ContextVar("kernels are compiled ahead", default=False)
_UNINITIALIZED = {torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty}


class Compiled:
    """Kernels that were compiled, and those that the cache had, since this object was made."""

    def __init__(self) -> None:
        self.kernels = self.cached = 0
        self._began = time.monotonic()

    def note(self, *, cache_hit: bool, **_: Any) -> None:
        """A listener of Triton's."""
        self.cached += cache_hit
        self.kernels += not cache_hit

    def __str__(self) -> str:
        return (
            f"kernels are ready after {time.monotonic() - self._began:.1f} s: {self.kernels} were compiled, "
            f"{self.cached} were in {knobs.cache.dir}"
        )


@contextmanager
def counted() -> Iterator[Compiled]:
    """Counts what is compiled meanwhile."""
    before, found = knobs.compilation.listener, Compiled()
    knobs.compilation.listener = found.note
    try:
        yield found
    finally:
        knobs.compilation.listener = before


@contextmanager
def ahead() -> Iterator[None]:
    """Kernels that are launched meanwhile are compiled and not run; at the end all are compiled.

    What they would have written is zeros, so that torch's own operations read valid numbers and indices.
    Passes compute few layers of each kind. The block ends early where a pass finds no memory. What it left
    out, and what cannot be compiled, is compiled at the first launch.
    """
    run = JITFunction.run

    def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        del warmup
        return run(self, *args, grid=grid, warmup=True, **options)

    threads = max(1, min(MOST_THREADS, torch.get_num_threads()))
    with (
        _parsed_one_at_a_time(),
        ThreadPoolExecutor(threads, "compile") as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True),
    ):
        before = _AHEAD.set(True)
        JITFunction.run = compiled
        try:
            with _Zeros():
                yield
        except torch.OutOfMemoryError as error:
            log.warning("kernels of some sizes are compiled one by one: %s", error)
        finally:
            JITFunction.run = run
            _AHEAD.reset(before)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _parsed_one_at_a_time() -> Iterator[None]:
    """Python 3.11 and 3.12 count the depth of the syntax trees that they make for all threads together.

    A collection in the middle lets another thread run; if that one parses, too, either fails with SystemError
    (https://github.com/python/cpython/issues/106905).
    """
    parse, lock = JITFunction.parse, threading.Lock()

    def parsed(self: Any) -> Any:
        with lock:
            return parse(self)

    JITFunction.parse = parsed
    try:
        yield
    finally:
        JITFunction.parse = parse


def is_ahead() -> bool:
    """Whether kernels are only compiled now."""
    return _AHEAD.get()


class _Zeros(TorchFunctionMode):
    """New tensors are zeros."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        return made.zero_() if func in _UNINITIALIZED else made
