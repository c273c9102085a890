"""Kernels are compiled side by side before they are launched. No GPU is needed for that."""

import ast
import os
import time

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from moe_worker.kernels.triton import compiling

pytestmark = pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="the interpreter compiles nothing")


class Hopper:
    """A driver of a GPU that is not there."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, _):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(driver, "_active", Hopper())


@triton.jit
def _fill(out, VALUE: tl.constexpr):
    tl.store(out, VALUE)


@triton.jit
def _broken(out, VALUE: tl.constexpr):
    tl.static_assert(VALUE == 0)


def test_kernels_are_compiled_before_they_are_launched_and_fill_nothing(hopper):
    with compiling.counted() as compiled:
        with compiling.ahead():
            assert compiling.is_ahead()
            out = torch.empty(1 << 20, dtype=torch.int32)
            for value in (7, 8, 7):
                _fill[(1,)](out, VALUE=value)
            _broken[(1,)](out, VALUE=1)  # says why at its first launch, not here
        assert not compiling.is_ahead()
        assert not out.any()
        assert compiled.kernels == 2
        kernels = _fill.device_caches[0][0].values()
        assert {kernel.name for kernel in kernels} == {"_fill"}
        with compiling.ahead():
            _fill[(1,)](out, VALUE=8)
        assert compiled.kernels == 2


def test_no_two_threads_parse_at_the_same_time(hopper, monkeypatch):
    """Two made Python 3.11 fail now and then."""
    parse, inside, most = ast.parse, [], []

    def slowly(*args, **options):
        inside.append(0)
        most.append(len(inside))
        time.sleep(0.05)
        try:
            return parse(*args, **options)
        finally:
            inside.pop()

    monkeypatch.setattr(ast, "parse", slowly)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    with compiling.ahead():
        for value in range(4):
            _fill[(1,)](torch.empty(1), VALUE=value)
    assert len(most) >= 4
    assert max(most) == 1


def test_a_pass_without_memory_leaves_its_kernels_to_their_first_launch(hopper, caplog):
    with compiling.ahead():
        raise torch.OutOfMemoryError("too little")
    assert "one by one: too little" in caplog.text
