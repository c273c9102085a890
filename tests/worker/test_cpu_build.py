"""Building the CPU kernels, and what is said where they cannot be had."""

import ctypes
import shutil

import pytest

from moe_worker.kernels import registry
from moe_worker.kernels.cpu import build
from moe_worker.kernels.registry import Hardware, choose

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@needs_compiler
@pytest.mark.slow  # tests/packaging compiles the same for the wheel
def test_a_build_makes_one_library_under_the_name_of_its_sources(tmp_path):
    made = build.build(tmp_path / "deep" / "cache")
    assert [path.name for path in made.parent.iterdir()] == [build.library_name()]
    assert ctypes.CDLL(str(made)).moe_supported() >= 0


@needs_compiler
def test_an_editable_install_has_the_library_beside_its_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "PACKAGED", tmp_path / "lib")
    placed = build.install()
    assert placed == build.install() == build.find_or_build() == tmp_path / "lib" / build.library_name()
    assert ctypes.CDLL(str(placed)).moe_supported() >= 0


def test_the_name_changes_with_the_sources(tmp_path, monkeypatch):
    before = build.library_name()
    shutil.copytree(build.NATIVE, tmp_path / "native")
    monkeypatch.setattr(build, "NATIVE", tmp_path / "native")
    assert build.library_name() == before
    with (tmp_path / "native" / "dot.h").open("a") as file:
        file.write("// changed\n")
    assert build.library_name() != before


def test_without_a_compiler_the_error_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler was found"):
        build.build(tmp_path)
    monkeypatch.setattr(registry.library, "supported_variants", lambda: build.build(tmp_path))
    hardware = registry.probe_cpu()
    assert str(choose("linear", "w4a8", hardware)).startswith(
        "w4a8 linear: reference, kernels.linear.Linear.forward (no C++ compiler was found"
    )


def test_a_compiler_that_fails_is_quoted(tmp_path, monkeypatch):
    compiler = tmp_path / "cxx"
    compiler.write_text("#!/bin/sh\necho 'x.h:1: error: nothing works' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(build.BuildError, match=r"x\.h:1: error: nothing works"):
        build.build(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("number_format", "hardware", "said"),
    [
        ("w4a8", Hardware("cpu", "avx512-vnni", "this CPU has avx512_vnni"),
         "w4a8 linear: cpu/avx512-vnni, kernels.cpu.library.Kernels.run (this CPU has avx512_vnni)"),
        ("w4a8", Hardware("cuda", "triton", "this is a CUDA device"),
         "w4a8 linear: triton, kernels.triton.linear.linear_packed (this is a CUDA device)"),
        ("fp32", Hardware("cpu", "avx2"),
         "fp32 linear: reference, kernels.linear.Linear.forward ("
         "there are no kernels for fp32 on cpu yet)"),
    ],
)  # fmt: skip
def test_every_choice_has_a_reason(number_format, hardware, said):
    assert registry.explain(number_format, hardware)[0] == said
